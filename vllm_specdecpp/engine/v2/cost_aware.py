# SPDX-License-Identifier: Apache-2.0
"""The cost-aware rule on Model Runner V2: the host begins rounds and learns from them; the device decides in them.

What became of a round is copied to the host behind it and taken in once it is there, in order: before the next round is
begun where the copy is there at once (a CPU), one round later on a GPU, later still with asynchronous scheduling.
Nothing here waits for the device.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_specdecpp.decision.cost_aware.drafting import CostAwareRound
from vllm_specdecpp.decision.cost_aware.tail import Report
from vllm_specdecpp.engine.shared.cost_aware import CostAwareDrafting
from vllm_specdecpp.engine.v1.inputs import RowState
from vllm_specdecpp.engine.v2.in_flight import HostCopy


class StreamClock:
    """Times what is queued on a device, without waiting for it.

    Args:
        device: a CUDA one is timed with events on the current stream, any other with the host's clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"

    def mark(self) -> Any:
        """This moment in the order of the stream."""
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks that the device has passed."""
        return start.elapsed_time(end) / 1e3 if self._on_cuda else end - start


@dataclass(frozen=True)
class Plan:
    """What rank 0 has decided about a round before its first draft pass; every rank follows it."""

    longest: int
    """Candidates of the longest draft that may come of it."""
    drafts: tuple[int, ...]
    """Rows of the batch that may draft."""
    reads: bool
    """Whether the draft model reads what the target has just read. If not, no draft pass is run at all."""


@dataclass
class _Begun:
    """A round that the rule has begun, and what has come back of it so far."""

    round_: CostAwareRound
    start: Any  # mark
    end: Any = None
    read: Sequence[int] = ()  # tokens of each pass that read, if that was more than the usual two a request
    report: HostCopy | None = None
    # Of the next step:
    next_start: Any = None
    request_ids: Sequence[str] = ()
    was_prefilling: Sequence[bool] = ()
    outcomes: HostCopy | None = None  # [num_reqs, 2] int64: sampled, rejected


class DeviceCostAware(CostAwareDrafting):
    """As :class:`CostAwareDrafting`, with the steps of a round on the device. Per step of the engine, all in order:
    :meth:`verified`, :meth:`begin_round`, drafting, :meth:`drafted`.

    Args:
        rule, tail, file, agree, device, measured: as in :class:`CostAwareDrafting`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._clock = StreamClock(self._device)
        self._begun: deque[_Begun] = deque()
        self._start: Any = None

    def verified(
        self,
        request_ids: Sequence[str],
        was_prefilling: Sequence[bool],
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
    ) -> None:
        """The target has verified what the last step drafted; learn from the rounds whose outcome is here.

        Args:
            request_ids: of the batch.
            was_prefilling: [num_reqs] requests of which this step verified nothing.
            num_sampled: [>= num_reqs] tokens, on the device.
            num_rejected: [>= num_reqs] booked candidates that were not accepted.
        """
        if self.rule is None:
            return
        self._start = self._clock.mark()
        if self._begun and self._begun[-1].outcomes is None:
            last, rows = self._begun[-1], slice(len(request_ids))
            last.next_start, last.request_ids, last.was_prefilling = self._start, request_ids, was_prefilling
            # Behind all else of that round: once it is here, so is the rest.
            last.outcomes = HostCopy(torch.stack((num_sampled[rows].long(), num_rejected[rows].long()), dim=1))
        self.settle()

    def settle(self) -> None:
        """Learn from the rounds whose outcome is here."""
        while self._begun and (outcomes := self._begun[0].outcomes) is not None and outcomes.is_here():
            self._learn_from(self._begun.popleft())

    def begin_round(
        self,
        request_ids: Sequence[str],
        max_lengths: Sequence[int],
        behind: Sequence[int],
        prompts: Sequence[int],
        next_positions: Sequence[int],
        room: Sequence[int],
    ) -> Plan | None:
        """Choose who drafts, and load what the device decides by; on every rank.

        Args:
            request_ids: of the batch.
            max_lengths: [num_reqs] upper bounds on the candidate lengths, as far as the host knows.
            behind: [num_reqs] tokens of earlier steps that the draft model would have to read before it drafts.
            prompts: [num_reqs] tokens of prompts in this step, which it reads if anybody drafts.
            next_positions: [num_reqs] of the token that the target emitted last, as far as the host knows.
            room: [num_reqs] tokens that each request may emit after it.

        Returns:
            None on ranks that follow rank 0.
        """
        plan = None
        if self.rule is not None:
            round_ = self.rule.begin(request_ids, max_lengths)
            wanted = round_.running.copy()
            rows = [RowState(name, at, at) for name, at in zip(request_ids, next_positions, strict=True)]
            self._output_lengths.update(dict(zip(request_ids, next_positions, strict=True)))
            late, new = np.array(behind, dtype=np.int64), np.array(prompts, dtype=np.int64)
            if (wanted & (late + new == 0)).any():
                new[:] = 0  # this step's prompts are read in any case
            # A pass of its own reads what was left out earlier; those that want it share its price.
            extra = np.where(late > 0, self.rule.costs.first.at(len(rows)) / max((wanted & (late > 0)).sum(), 1), 0.0)
            self._leave_out(round_, rows, (late + new).tolist(), room, extra.tolist())
            plan = self._plan(round_, bool(wanted.any()))
            if any(max_lengths):
                self.drafting = bool(plan.drafts)
            round_.load(self.tail.params)
            self._begun.append(_Begun(round_, self._start))
        self.tail.params.packed.copy_(self._agree(self.tail.params.packed))
        return plan

    def _plan(self, round_: CostAwareRound, was_wanted: bool) -> Plan:
        assert self.rule is not None
        limits = np.where(round_.drafts, round_.limits, 0)
        drafts = tuple(np.flatnonzero(limits).tolist())
        # While drafting pays, a round that has nobody to draft for yet reads prompts, and one that is left out to see
        # what a round takes without keeps the draft model's KV up to date.
        reads = bool(drafts) or (self.rule.start.drafting and not was_wanted and not round_.held)
        return Plan(int(limits.max(initial=0)), drafts, reads)

    def drafted(self, read: Sequence[int], num_reqs: int, max_lengths: torch.Tensor, lengths: torch.Tensor) -> None:
        """The round that was begun last has been drafted, or what drafts it is queued.

        Args:
            read: tokens of each pass that read, if that was more than the usual two a request, else empty.
            num_reqs: in the batch.
            max_lengths: [>= num_reqs] int32, what each request had room for.
            lengths: [>= num_reqs] int32, candidates submitted.
        """
        if self.rule is None:
            return
        last = self._begun[-1]
        last.read, last.end = read, self._clock.mark()
        last.report = HostCopy(self.tail.report(num_reqs, max_lengths, lengths))

    def drop_round(self) -> None:
        """Another rule drafts from now on: what comes back is of no round that was begun here."""
        super().drop_round()
        self._begun.clear()

    def stats(self) -> dict[str, Any]:
        """See :meth:`CostAwareDrafting.stats`."""
        self.settle()
        return super().stats()

    def _learn_from(self, begun: _Begun) -> None:
        assert self.rule is not None and begun.report is not None and begun.outcomes is not None
        round_, num_reqs = begun.round_, len(begun.round_.request_ids)
        round_.fill(Report.of(begun.report.tensor, num_reqs, len(self.tail.widths)))
        step = {
            "draft_seconds": self._clock.seconds(begun.start, begun.end),
            "read": begun.read,
        }
        rest = self._clock.seconds(begun.end, begun.next_start)
        self.finish(round_, step, _outcomes(begun), len(begun.request_ids), rest)


def _outcomes(begun: _Begun) -> dict[str, tuple[int, int]]:
    """Request id -> candidates verified and accepted, of those of the round that the next step verified."""
    assert begun.outcomes is not None
    submitted = dict(zip(begun.round_.request_ids, begun.round_.lengths.tolist(), strict=True))
    found = {}
    rows = zip(begun.request_ids, begun.was_prefilling, begun.outcomes.tensor.tolist(), strict=True)
    for request_id, was_prefilling, (num_sampled, num_rejected) in rows:
        if request_id in submitted and num_sampled and not was_prefilling:
            # The scheduler may submit fewer than were drafted, or book room for more.
            booked = num_sampled - 1 + num_rejected
            found[request_id] = min(submitted[request_id], booked), num_sampled - 1
    return found
