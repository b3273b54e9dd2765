# SPDX-License-Identifier: Apache-2.0
"""Free runs on Model Runner V2: found, chosen and submitted on the device, in a round whose plan the host has made.

No search is waited for: the plan reckons with what the last reported runs promised, and what the rule learns from rides
along in the round's report. What is waited for: :meth:`DeviceFreeRuns.took_runs`.

Lossless: a run is a function of the tokens that the target has emitted (for other requests, too, if asked for) and,
behind a draft, of its candidates Y_1..Y_d; its draft logits are one-hot. Which one is taken, and where it is cut, is a
function of these tokens, of the scores that the draft ended by, and of what was loaded before the round: of nothing
that comes after Y_d.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, SupportsIndex

import torch
from vllm.logger import init_logger
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor, UvaBufferPool

from vllm_specdecpp.decision.cost_aware.device_runs import RowsBefore, TakenRows
from vllm_specdecpp.decision.cost_aware.tail import CostAwareTail
from vllm_specdecpp.engine.v2.kv import DraftKVGaps
from vllm_specdecpp.kernels.one_hot_rows import one_hot_rows
from vllm_specdecpp.kernels.runs import behind_drafts, take_runs
from vllm_specdecpp.kernels.suffix_cache import match_others
from vllm_specdecpp.kernels.suffix_match import suffix_match

logger = init_logger("vllm.specdecpp")

MOST_PAIRS = 65_536
"""Requests of the batch times requests held; beyond, nobody looks in others' outputs: it would take milliseconds."""
COLUMNS, BEHIND = 4, 3
"""Numbers a request in :meth:`DeviceFreeRuns.report`, and those more if somebody drafts."""


class DeviceFreeRuns:
    """The runs of a round. Per step :meth:`verified`; and if runs may be taken, :meth:`find` once the round's
    parameters are loaded, :meth:`follow` behind its last draft pass if there was one, and :meth:`submit`.

    Args:
        speculator: whose rounds they join.
        of_others: whether other requests' outputs are searched as well, ``suffix_cache="engine"``.
    """

    match = staticmethod(suffix_match)
    match_others = staticmethod(match_others)
    take = staticmethod(take_runs)
    behind = staticmethod(behind_drafts)
    make_certain = staticmethod(one_hot_rows)

    def __init__(self, speculator: Any, of_others: bool = False) -> None:
        self._speculator, self._of_others = speculator, of_others
        num_reqs, device = speculator.max_num_reqs, speculator.device
        shape = num_reqs, speculator.num_speculative_steps
        self._ran = torch.zeros(num_reqs, dtype=torch.int32, device=device)  # by request state, in its last round
        self._candidates = torch.full(shape, -1, device=device)
        self._accept = torch.zeros(shape, device=device)  # chance of each of them
        self._batch: Any = None  # of the round
        self._found: list[tuple[torch.Tensor, TakenRows]] = []  # matches [num_reqs]: of the round's tokens, its drafts
        self._may_have_run: set[str] = set()
        self._names: list[str] = []  # of the step's requests, that may have taken a run in their last round
        self._last_ran: torch.Tensor  # [num_reqs] candidates of these runs
        self._num_sampled: torch.Tensor  # [>= num_reqs] in this step

    def warm(self, tail: CostAwareTail) -> None:
        """Compile what a round launches, between two rounds: nothing is compiled in service."""
        speculator, rows = self._speculator, slice(1)
        speculator.round.begin()  # nothing is drafted, so nothing is put down behind anybody's tokens
        states = torch.zeros_like(speculator.idx_mapping[rows])
        self._batch = SimpleNamespace(num_reqs=1, idx_mapping=states)
        last, limits = torch.zeros_like(states, dtype=torch.int64), torch.zeros_like(states, dtype=torch.int32)
        self._found = [self._search(last, limits, tail)]
        self.follow(tail)
        if speculator.draft_logits is not None:
            self.make_certain(speculator.draft_logits, states, torch.full_like(self._candidates[rows], -1))

    def verified(self, input_batch: Any, num_sampled: torch.Tensor) -> None:
        """A step begins: some of the runs of before were verified in it. No run is in this round so far."""
        states = input_batch.idx_mapping
        self._last_ran, self._num_sampled = self._ran[states], num_sampled
        self._ran.index_fill_(0, states.long(), 0)
        self._names = [name for name in input_batch.req_ids if name in self._may_have_run]
        held = self._speculator.requests
        self._may_have_run = {name for name in self._may_have_run.difference(self._names) if name in held}

    def took_runs(self) -> dict[str, int]:
        """Requests of the step whose last round had a run that may have left a gap, and how many candidates that round
        had; the same on every rank.

        Waits for the last round's drafting, behind which the target's pass is queued already. That costs less than to
        wait for this pass, to learn from it who is behind (:meth:`DraftKVGaps.catch_up`).
        """
        ran, most = self._speculator.log.ran() if self._names else {}, self._speculator.num_speculative_steps
        rounds = ((name, *ran.get(name, (0, most))) for name in self._names)
        # Of a run alone the first token is read by the round's own first pass.
        return {name: drafted + run for name, drafted, run in rounds if run > (not drafted)}

    def has_gap(self, input_batch: Any) -> torch.Tensor:
        """[num_reqs] bool, requests of whose last run this step has accepted tokens that the draft model has not read:
        all but the last one, which the next first pass reads."""
        # It has read the token that the run's round began with, and of the candidates that it drew all but one.
        drafted = self._speculator.submitted[input_batch.idx_mapping] - self._last_ran
        unread = self._num_sampled[: input_batch.num_reqs] > drafted.clamp(min=1) + 1
        return (self._last_ran > 0) & unread

    def find(self, input_batch: Any, tail: CostAwareTail) -> None:
        """Choose the runs of requests that do not draft; ``tail`` has begun the round."""
        self._batch, state, rows = input_batch, self._speculator.round, slice(input_batch.num_reqs)
        self._found = [self._search(state.next_positions[rows], state.max_lengths[rows], tail)]
        tail.params.base.add_((self._candidates[rows] >= 0).sum())

    def follow(self, tail: CostAwareTail) -> None:
        """Let runs go on behind the drafts, as far as their rows pay: :meth:`CostAwareRound.follow`."""
        speculator, rows = self._speculator, slice(self._batch.num_reqs)
        state, ((_, free),) = speculator.round, self._found
        last, limits, before = self.behind(
            speculator.runner.req_states.all_token_ids.gpu, self._batch.idx_mapping[rows], state.next_positions[rows],
            state.max_lengths[rows], state.lengths[rows], state.draft_tokens[rows], state.stop_token_ids[rows],
            free.accepted, **tail.left(self._batch.num_reqs),
        )  # fmt: skip
        self._found.append(self._search(last, limits, tail, before))

    def _search(
        self, last: torch.Tensor, limits: torch.Tensor, tail: CostAwareTail, before: RowsBefore | None = None
    ) -> tuple[torch.Tensor, TakenRows]:
        """Put down the runs that go on from position ``last`` [num_reqs], as far as they pay: [num_reqs] int32 tokens
        that match; what is taken."""
        speculator, rows = self._speculator, slice(len(last))
        requests, states = speculator.runner.req_states, self._batch.idx_mapping[rows]
        tokens = requests.all_token_ids.gpu
        starts, matches, candidates = torch.empty_like(last), torch.empty_like(limits), self._candidates[rows]
        self.match(tokens, states, last, limits, starts=starts, matches=matches)
        if self._of_others and len(last) * len(tokens) <= MOST_PAIRS:
            states, last, limits = self.match_others(
                tokens, states, last, limits, requests.prompt_len.gpu, requests.total_len.gpu,
                starts=starts, matches=matches,
            )  # fmt: skip
        taken = self.take(
            tokens, states, last, starts, matches, limits, speculator.round.stop_token_ids[rows], tail.drafts[rows],
            speculator.round.lengths[rows], tail.params, before, candidates=candidates, accept=self._accept[rows],
        )  # fmt: skip
        if (agreed := speculator.agree(candidates)) is not candidates:
            candidates.copy_(agreed)
        return matches, taken

    def submit(self) -> None:
        """Put the runs beside and behind the drafts."""
        input_batch = self._batch
        speculator, rows = self._speculator, slice(input_batch.num_reqs)
        state, candidates = speculator.round, self._candidates[rows]
        there, states = candidates >= 0, input_batch.idx_mapping[rows]
        lengths = there.sum(dim=1, dtype=torch.int32)
        drafted = state.draft_tokens[rows]  # -1 where the runs are
        torch.maximum(drafted, candidates, out=drafted)
        state.lengths[rows].add_(lengths)
        if state.confidences is not None:
            state.confidences[rows] = torch.where(there, self._accept[rows], state.confidences[rows])
        if speculator.draft_logits is not None:
            self.make_certain(speculator.draft_logits, states, candidates)
        self._ran[states] = lengths
        self._may_have_run.update(input_batch.req_ids)

    def lengths(self, input_batch: Any) -> torch.Tensor:
        """[num_reqs] candidates of each request's run in this round."""
        return self._ran[input_batch.idx_mapping]

    @property
    def gaps(self) -> DraftKVGaps:
        """Of the draft model's KV."""
        gaps: DraftKVGaps = self._speculator.gaps
        return gaps

    def report(self) -> list[torch.Tensor]:
        """What the host learns of the round: COLUMNS or COLUMNS + BEHIND of [num_reqs] float32, whole numbers as int32
        in their bits: for each request the tokens that the draft model is behind; the tokens that matched, what was
        taken, or would have been if it did not draft, and what was expected of that; and of runs behind drafts the same
        three."""
        columns = [self.gaps.num_behind(self._batch, self._speculator.round.next_positions).int()]
        for matches, taken in self._found:
            columns += [matches, taken.lengths, taken.accepted]
        return [column.view(torch.float32) for column in columns]


class OldestFirst(list[int]):
    """Free request states, of which the one that was freed first is taken first: the tokens of requests that have ended
    stay as long as they can. vLLM takes the one that was freed last (``RequestState.free_indices``)."""

    def pop(self, index: SupportsIndex = 0, /) -> int:
        """Take one."""
        return super().pop(index)


def hold_tokens(req_states: Any, of_others: bool = False, room: float = math.inf) -> None:
    """Keep the requests' tokens on the device, before anything else refers to them: they are searched in each round.

    vLLM keeps them on the host, where a device reads them over the bus (``RequestState``, ``UvaBuffer``); for its own
    ngram it does not. Takes 4 bytes for each of max_num_seqs × max_model_len.

    Args:
        req_states: vLLM's ``RequestState``.
        of_others: whether requests look in each other's outputs: in those of the last max_num_seqs requests then.
        room: bytes; where more would be taken, the tokens stay on the host.
    """
    shape = req_states.max_num_reqs, req_states.max_model_len
    where = "on the device" if 4 * math.prod(shape) <= room else "on the host, as they are many: each search is slower"
    logger.info("specdecpp: tokens that are searched for free runs, %.0f MiB, are %s", math.prod(shape) / 2**18, where)
    if 4 * math.prod(shape) <= room:
        req_states.all_token_ids = StagedWriteTensor(shape, dtype=torch.int32, device=req_states.device)
    if of_others:
        req_states.free_indices = OldestFirst(req_states.free_indices)
        # vLLM reads these before drafting, and may write them anew as soon as it has: we read them while we draft.
        pool = req_states.prompt_len.pool
        req_states.prompt_len.pool = UvaBufferPool(pool.size, pool.dtype, pool.max_concurrency + 1)
