# SPDX-License-Identifier: Apache-2.0
"""Free runs on Model Runner V2: found, chosen and submitted on the device, in a round whose plan the host has made.

No search is waited for: the plan reckons with what the last reported runs promised, and what the rule learns from rides
along in the round's report. What is waited for: :meth:`DeviceFreeRuns.took_runs`.

Lossless: a run is a function of the tokens that the target has emitted and, behind a draft, of its candidates
Y_1..Y_d; its draft logits are one-hot. Which one is taken, and where it is cut, is a function of these tokens, of the
scores that the draft ended by, and of what was loaded before the round: of nothing that comes after Y_d.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor

from vllm_specdecpp.decision.cost_aware.device_runs import RowsBefore, TakenRows, draft_seconds, take_rows
from vllm_specdecpp.decision.cost_aware.tail import CostAwareTail
from vllm_specdecpp.engine.v2.kv import DraftKVGaps
from vllm_specdecpp.kernels.one_hot_rows import one_hot_rows
from vllm_specdecpp.kernels.suffix_match import suffix_match

COLUMNS, BEHIND = 4, 3
"""Numbers a request in :meth:`DeviceFreeRuns.report`, and those more if somebody drafts."""


class DeviceFreeRuns:
    """The runs of a round. Per step :meth:`verified`; and if runs may be taken, :meth:`find` once the round's
    parameters are loaded, :meth:`follow` behind its last draft pass if there was one, and :meth:`submit`.

    Args:
        speculator: whose rounds they join.
    """

    match = staticmethod(suffix_match)
    make_certain = staticmethod(one_hot_rows)

    def __init__(self, speculator: Any) -> None:
        self._speculator = speculator
        num_reqs, device = speculator.max_num_reqs, speculator.device
        shape = num_reqs, speculator.num_speculative_steps
        self._ran = torch.zeros(num_reqs, dtype=torch.int32, device=device)  # by request state, in its last round
        self._candidates = torch.full(shape, -1, device=device)
        self._accept: torch.Tensor  # [num_reqs, num_steps] float32, chance of each of them
        self._batch: Any = None  # of the round
        self._found: list[tuple[torch.Tensor, TakenRows]] = []  # matches [num_reqs]: of the round's tokens, its drafts
        self._may_have_run: set[str] = set()
        self._names: list[str] = []  # of the step's requests, that may have taken a run in their last round
        self._last_ran: torch.Tensor  # [num_reqs] candidates of these runs
        self._num_sampled: torch.Tensor  # [>= num_reqs] in this step

    def warm(self) -> None:
        """Compile what a round launches: nothing is compiled in service."""
        one, speculator = slice(1), self._speculator
        tokens, states = speculator.runner.req_states.all_token_ids.gpu, speculator.idx_mapping[one]
        last, limits = torch.zeros_like(states, dtype=torch.int64), torch.zeros_like(states, dtype=torch.int32)
        self.match(tokens, states, last, limits, starts=torch.empty_like(last), matches=torch.empty_like(limits))
        if speculator.draft_logits is not None:
            self.make_certain(speculator.draft_logits, states, torch.full_like(self._candidates[one], -1))

    def verified(self, input_batch: Any, num_sampled: torch.Tensor) -> None:
        """A step begins: some of the runs of before were verified in it. No run is in this round so far."""
        states = input_batch.idx_mapping
        self._last_ran, self._num_sampled = self._ran[states], num_sampled
        self._ran.index_fill_(0, states.long(), 0)
        self._names = [name for name in input_batch.req_ids if name in self._may_have_run]
        held = self._speculator.requests
        self._may_have_run = {name for name in self._may_have_run.difference(self._names) if name in held}

    def took_runs(self) -> list[str]:
        """Requests of the step that have taken a run in their last round; the same on every rank.

        Waits for the last round's drafting, behind which the target's pass is queued already. That costs less than to
        wait for this pass, to learn from it who is behind (:meth:`DraftKVGaps.catch_up`).
        """
        ran = self._speculator.log.ran() if self._names else {}
        return [name for name in self._names if ran.get(name, 1)]

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
        run, matches, taken = self._search(state.next_positions[rows], state.max_lengths[rows], tail)
        self._found, self._accept = [(matches, taken)], taken.accept
        lengths = torch.where(tail.drafts[rows] > 0, 0, taken.lengths)
        there = self._steps < lengths[:, None]
        self._candidates[rows] = self._speculator.agree(torch.where(there, run, -1))
        tail.params.base.add_((self._candidates[rows] >= 0).sum())

    def follow(self, tail: CostAwareTail) -> None:
        """Let runs go on behind the drafts, as far as their rows pay: :meth:`CostAwareRound.follow`."""
        input_batch, speculator = self._batch, self._speculator
        state, rows = speculator.round, slice(input_batch.num_reqs)
        drafted, lengths, last = state.draft_tokens[rows], state.lengths[rows], state.next_positions[rows]
        # vLLM reads no further than a request's last token, and writes before it does.
        tokens, states = speculator.runner.req_states.all_token_ids.gpu, input_batch.idx_mapping[rows].long()[:, None]
        at = (last[:, None] + 1 + self._steps).clamp(max=tokens.shape[1] - 1)  # [num_reqs, num_steps]
        tokens[states, at] = torch.where(drafted >= 0, drafted.int(), tokens[states, at])
        end = drafted.gather(1, (lengths[:, None] - 1).clamp(min=0).long())  # [num_reqs, 1]
        has_ended = ((end == state.stop_token_ids[rows]) & (end >= 0)).any(dim=1)
        drafts = tail.drafts[rows] > 0
        limits = torch.where(drafts & ~has_ended, state.max_lengths[rows] - lengths, 0)
        ((_, free),) = self._found
        num_reqs, own = len(lengths), torch.where(drafts, 0.0, free.accepted)
        emitted = num_reqs + (tail.expected[rows] + own).double().sum()
        spent = draft_seconds(tail.widths, tail.params)
        before = RowsBefore(tail.params.base + lengths.sum(), emitted, spent, tail.reach(lengths))
        run, matches, taken = self._search(last + lengths, limits, tail, before)
        self._found.append((matches, taken))
        place = self._steps - lengths[:, None]  # in the run
        there = (place >= 0) & (place < taken.lengths[:, None])
        place = place.clamp(min=0)
        self._accept = torch.where(there, taken.accept.gather(1, place), self._accept)
        candidates = torch.where(there, run.gather(1, place), self._candidates[rows])
        self._candidates[rows] = speculator.agree(candidates)

    @property
    def _steps(self) -> torch.Tensor:
        """[num_steps] 0, 1, 2, ..."""
        return torch.arange(self._candidates.shape[1], device=self._candidates.device)

    def _search(
        self, last: torch.Tensor, limits: torch.Tensor, tail: CostAwareTail, before: RowsBefore | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, TakenRows]:
        """The runs that go on from position ``last`` [num_reqs]: [num_reqs, num_steps] tokens, as far as they go;
        [num_reqs] int32 tokens that match; what is taken."""
        rows, num_steps = slice(len(last)), self._candidates.shape[1]
        tokens, states = self._speculator.runner.req_states.all_token_ids.gpu, self._batch.idx_mapping[rows]
        starts, matches = torch.empty_like(last), torch.empty_like(limits)
        self.match(tokens, states, last, limits, starts=starts, matches=matches)
        # A run that comes to the last token goes on as a loop.
        at = starts[:, None] + self._steps % (last + 1 - starts).clamp(min=1)[:, None]
        run = tokens[states.long()[:, None], at.clamp(max=tokens.shape[1] - 1)].long()
        # A stop token ends a run.
        ends = self._speculator.round.stop_token_ids[rows]
        stops = (run[:, :, None] == ends[:, None, :]).any(dim=2)  # [num_reqs, num_steps]
        room = torch.where(stops.any(dim=1), stops.int().argmax(dim=1) + 1, num_steps).int()
        return run, matches, take_rows(matches, torch.minimum(limits, room), num_steps, tail.params, before)

    def submit(self) -> None:
        """Put the runs beside and behind the drafts."""
        input_batch = self._batch
        speculator, rows = self._speculator, slice(input_batch.num_reqs)
        state, candidates = speculator.round, self._candidates[rows]
        there, states = candidates >= 0, input_batch.idx_mapping[rows]
        lengths = there.sum(dim=1).int()
        state.draft_tokens[rows] = torch.where(there, candidates, state.draft_tokens[rows])
        state.lengths[rows] += lengths
        if state.confidences is not None:
            state.confidences[rows] = torch.where(there, self._accept, state.confidences[rows])
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

    def report(self) -> torch.Tensor:
        """What the host learns of the round: [COLUMNS * num_reqs] float32, or [(COLUMNS + BEHIND) * num_reqs]: for each
        request the tokens that the draft model is behind; the tokens that matched, what was taken, or would have been
        if it did not draft, and what was expected of that; and of runs behind drafts the same three."""
        columns = [self.gaps.num_behind(self._batch, self._speculator.round.next_positions)]
        for matches, taken in self._found:
            columns += [matches, taken.lengths, taken.accepted]
        return torch.cat([column.float() for column in columns])


def hold_tokens(req_states: Any) -> None:
    """Keep the requests' tokens on the device, before anything else refers to them: they are searched in each round.

    vLLM keeps them on the host, where a device reads them over the bus (``RequestState``, ``UvaBuffer``); for its own
    ngram it does not. Takes 4 bytes for each of max_num_seqs × max_model_len.
    """
    shape = req_states.max_num_reqs, req_states.max_model_len
    req_states.all_token_ids = StagedWriteTensor(shape, dtype=torch.int32, device=req_states.device)
