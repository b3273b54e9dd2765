# SPDX-License-Identifier: Apache-2.0
"""Free runs on Model Runner V2: found, chosen and submitted on the device, in a round whose plan the host has made.

The host is not waited for, nor the device: the plan reckons with what the last reported runs promised, and what the
rule learns from rides along in the round's report.

Lossless: a run is a function of the tokens that the target has emitted; its draft logits are one-hot. Which one is
taken, and where it is cut, is a function of these tokens and of what was loaded before the round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vllm_specdecpp.decision.cost_aware.device_runs import TakenRows, take_rows
from vllm_specdecpp.decision.cost_aware.tail import CostAwareTail
from vllm_specdecpp.engine.v2.kv import DraftKVGaps
from vllm_specdecpp.kernels.one_hot_rows import one_hot_rows
from vllm_specdecpp.kernels.suffix_match import suffix_match

COLUMNS = 4
"""Numbers a request in :meth:`DeviceFreeRuns.report`."""


class DeviceFreeRuns:
    """The runs of a round. Per step :meth:`verified`; and if runs may be taken, :meth:`find` once the round's
    parameters are loaded, :meth:`submit` behind its last draft pass.

    Args:
        speculator: whose rounds they join.

    Attributes:
        has_gap: [num_reqs] bool, requests of whose last run this step has accepted tokens that the draft model has not
            read: all but the last one, which the next first pass reads.
        names: requests of the step that may have taken a run in their last round, as every host knows.
    """

    match = staticmethod(suffix_match)
    make_certain = staticmethod(one_hot_rows)

    def __init__(self, speculator: Any) -> None:
        self._speculator = speculator
        num_reqs, device = speculator.max_num_reqs, speculator.device
        shape = num_reqs, speculator.num_speculative_steps
        self._ran = torch.zeros(num_reqs, dtype=torch.int32, device=device)  # by request state, in its last round
        self._starts = torch.zeros(num_reqs, dtype=torch.int64, device=device)
        self._matches = torch.zeros(num_reqs, dtype=torch.int32, device=device)
        self._candidates = torch.full(shape, -1, device=device)
        self._batch: Any = None  # of the round
        self._taken: TakenRows
        self._may_have_run: set[str] = set()
        self.has_gap: torch.Tensor
        self.names: list[str] = []

    def warm(self) -> None:
        """Compile what a round launches: nothing is compiled in service."""
        one, speculator = slice(1), self._speculator
        tokens, states = speculator.runner.req_states.all_token_ids.gpu, speculator.idx_mapping[one]
        starts, matches = self._starts[one], self._matches[one]
        self.match(tokens, states, starts, matches.zero_(), starts=torch.empty_like(starts), matches=matches.clone())
        if speculator.draft_logits is not None:
            self.make_certain(speculator.draft_logits, states, torch.full_like(self._candidates[one], -1))

    def verified(self, input_batch: Any, num_sampled: torch.Tensor) -> None:
        """A step begins: some of the runs of before were verified in it. No run is in this round so far."""
        states = input_batch.idx_mapping
        self.has_gap = (self._ran[states] > 0) & (num_sampled[: input_batch.num_reqs] > 2)
        self._ran.index_fill_(0, states.long(), 0)
        self.names = [name for name in input_batch.req_ids if name in self._may_have_run]
        held = self._speculator.requests
        self._may_have_run = {name for name in self._may_have_run.difference(self.names) if name in held}

    def find(self, input_batch: Any, tail: CostAwareTail) -> None:
        """Choose the runs of requests that do not draft; ``tail`` has begun the round."""
        self._batch = input_batch
        state, num_reqs = self._speculator.round, input_batch.num_reqs
        rows, states = slice(num_reqs), input_batch.idx_mapping[:num_reqs]
        limits, last = state.max_lengths[rows], state.next_positions[rows]
        starts, matches = self._starts[rows], self._matches[rows]
        tokens = self._speculator.runner.req_states.all_token_ids.gpu
        self.match(tokens, states, last, limits, starts=starts, matches=matches)
        num_steps = self._candidates.shape[1]
        steps = torch.arange(num_steps, device=tokens.device)
        # A run that comes to the last token goes on as a loop.
        at = starts[:, None] + steps % (last + 1 - starts).clamp(min=1)[:, None]
        run = tokens[states.long()[:, None], at.clamp(max=tokens.shape[1] - 1)].long()
        # A stop token ends a run.
        stops = (run[:, :, None] == state.stop_token_ids[rows][:, None, :]).any(dim=2)  # [num_reqs, num_steps]
        room = torch.where(stops.any(dim=1), stops.int().argmax(dim=1) + 1, num_steps).int()
        self._taken = take_rows(matches, torch.minimum(limits, room), num_steps, tail.params)
        lengths = torch.where(tail.drafts[rows] > 0, 0, self._taken.lengths)
        self._candidates[rows] = self._speculator.agree(torch.where(steps < lengths[:, None], run, -1))
        tail.params.base.add_((self._candidates[rows] >= 0).sum())

    def submit(self, drafts: Sequence[int]) -> None:
        """Put the runs beside the drafts of ``drafts``, the rows that may have drafted."""
        input_batch = self._batch
        speculator, rows = self._speculator, slice(input_batch.num_reqs)
        state, candidates = speculator.round, self._candidates[rows]
        there, states = candidates >= 0, input_batch.idx_mapping[rows]
        lengths = there.sum(dim=1).int()
        state.draft_tokens[rows] = torch.where(there, candidates, state.draft_tokens[rows])
        state.lengths[rows] += lengths
        if state.confidences is not None:
            state.confidences[rows] = torch.where(there, self._taken.accept, state.confidences[rows])
        if speculator.draft_logits is not None:
            self.make_certain(speculator.draft_logits, states, candidates)
        self._ran[states] = lengths
        self._may_have_run.update(input_batch.req_ids)
        self._may_have_run.difference_update(input_batch.req_ids[row] for row in drafts)

    def lengths(self, input_batch: Any) -> torch.Tensor:
        """[num_reqs] candidates of each request's run in this round."""
        return self._ran[input_batch.idx_mapping]

    @property
    def gaps(self) -> DraftKVGaps:
        """Of the draft model's KV."""
        gaps: DraftKVGaps = self._speculator.gaps
        return gaps

    def report(self) -> torch.Tensor:
        """What the host learns of the round: [COLUMNS * num_reqs] float32, for each request the tokens that matched,
        what was taken, or would have been if it did not draft, what was expected of that; and the tokens that the
        draft model is behind."""
        behind = self.gaps.num_behind(self._batch, self._speculator.round.next_positions)
        columns = self._matches[: self._batch.num_reqs], self._taken.lengths, self._taken.accepted, behind
        return torch.cat([column.float() for column in columns])
