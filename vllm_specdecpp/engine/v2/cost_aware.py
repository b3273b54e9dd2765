# SPDX-License-Identifier: Apache-2.0
"""The cost-aware rule on Model Runner V2: the host begins rounds and learns from them; the device decides in them.

What became of a round is copied to the host behind it and taken in once it is there, in order: before the next round is
begun where the copy is there at once (a CPU), one round later on a GPU, later still with asynchronous scheduling.
Nothing here waits for the device.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_specdecpp.decision.cost_aware.admission import Standing
from vllm_specdecpp.decision.cost_aware.drafting import CostAwareRound
from vllm_specdecpp.decision.cost_aware.tail import Report
from vllm_specdecpp.engine.shared.cost_aware import CostAwareDrafting
from vllm_specdecpp.engine.v2.free_runs import BEHIND, COLUMNS, DeviceFreeRuns
from vllm_specdecpp.engine.v2.in_flight import HostCopy, InFlight


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
    takes_runs: bool = True
    """Whether requests may take free runs."""


@dataclass
class _Begun:
    """A round that the rule has begun, and what has come back of it so far."""

    round_: CostAwareRound
    start: Any  # mark
    end: Any = None
    read: Sequence[int] = ()  # tokens of each pass that read, if that was more than the usual two a request
    report: HostCopy | None = None
    runs: DeviceFreeRuns | None = None  # that joined it


class DeviceCostAware(CostAwareDrafting):
    """As :class:`CostAwareDrafting`, with the steps of a round on the device. Per step of the engine, all in order:
    :meth:`verified`, :meth:`begin_round`, drafting, :meth:`drafted`.

    Args:
        rule, tail, file, agree, device, measured: as in :class:`CostAwareDrafting`.

    Attributes:
        runs: free runs that join the next round; None: none do.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._clock = StreamClock(self._device)
        self.in_flight = InFlight()
        self._last: _Begun | None = None  # the round that the next step verifies
        self.runs: DeviceFreeRuns | None = None
        self._start: Any = None
        self._drafting = True  # whether somebody drafted in the last round

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
        if self._last is not None:
            rows = slice(len(request_ids))
            # Behind all else of that round: once it is here, so is the rest.
            outcomes = HostCopy(torch.stack((num_sampled[rows], num_rejected[rows]), dim=1))
            self.in_flight.send(outcomes, self._learn_from, self._last, self._start, request_ids, was_prefilling)
            self._last = None
        self.in_flight.settle()

    def begin_round(
        self,
        request_ids: Sequence[str],
        max_lengths: Sequence[int],
        behind: Sequence[int],
        prompts: Sequence[int],
        room: Sequence[int],
        emitted: Sequence[int],
        constrained: Sequence[bool],
    ) -> Plan | None:
        """Choose who drafts, and load what the device decides by; on every rank.

        Args:
            request_ids: of the batch.
            max_lengths: [num_reqs] upper bounds on the candidate lengths, as far as the host knows.
            behind: [num_reqs] tokens of earlier steps that the draft model would have to read before it drafts.
            prompts: [num_reqs] tokens of prompts in this step, which it reads if anybody drafts.
            room: [num_reqs] tokens that each request may emit after its next token, as far as the host knows.
            emitted: [num_reqs] tokens that it has emitted, likewise.
            constrained: [num_reqs] as in :class:`Standing`.

        Returns:
            None on ranks that follow rank 0.
        """
        plan = None
        if self.rule is not None:
            unread = behind
            if any(prompts):
                unread = [late + new for late, new in zip(behind, prompts, strict=True)]
                if self._drafting and any(limit and not num for limit, num in zip(max_lengths, unread, strict=True)):
                    unread = behind  # somebody drafts: this step's prompts are read in any case
            apart = [0.0] * len(behind)
            if any(behind):
                # A pass of its own reads what was left out earlier; the requests that it is for share its price.
                share = self.rule.costs.first.at(len(behind)) / sum(num > 0 for num in behind)
                apart = [share if num else 0.0 for num in behind]
            rows = zip(request_ids, max_lengths, room, unread, emitted, apart, constrained, strict=True)
            batch = list(map(Standing._make, rows))
            round_ = None
            if not self.has_failed:
                with self._guarded():
                    round_ = self.rule.begin(batch, () if self.runs is None else None)
            if round_ is None:
                round_ = self._idle(batch)
            drafts = round_.drafts.nonzero()[0].tolist()
            longest = max(round_.limits[drafts].tolist(), default=0)
            self._drafting = bool(longest)
            plan = Plan(longest, tuple(drafts), reads=self._drafting, takes_runs=not self.has_failed)
            self._load(round_)
            self._last = None if self.has_failed else _Begun(round_, self._start, runs=self.runs)
        self.share_params()
        return plan

    def drafted(self, read: Sequence[int], num_reqs: int, lengths: torch.Tensor) -> None:
        """The round that was begun last has been drafted, or what drafts it is queued.

        Args:
            read: tokens of each pass that read, if that was more than the usual two a request, else empty.
            num_reqs: in the batch.
            lengths: [>= num_reqs] int32, candidates submitted.
        """
        if self.rule is None:
            return
        last = self._last
        if last is None:
            assert self.has_failed
            return
        last.read, last.end = read, self._clock.mark()
        last.report = HostCopy(self.tail.report(lengths[:num_reqs], *(() if last.runs is None else last.runs.report())))

    def drop_round(self) -> None:
        """Another rule drafts from now on: what comes back is of no round that was begun here."""
        super().drop_round()
        self._last = None
        self.in_flight.drop(self._learn_from)

    def stats(self) -> dict[str, Any]:
        """See :meth:`CostAwareDrafting.stats`."""
        self.in_flight.settle()
        return super().stats()

    def _learn_from(
        self, outcomes: torch.Tensor, begun: _Begun, next_start: Any, request_ids: Sequence[str],
        was_prefilling: Sequence[bool],
    ) -> None:  # fmt: skip
        """A round and the step that verified it are over; arguments as in :meth:`verified`."""
        if not self.has_failed:
            with self._guarded():
                self._learn(outcomes, begun, next_start, request_ids, was_prefilling)

    def _learn(
        self, outcomes: torch.Tensor, begun: _Begun, next_start: Any, request_ids: Sequence[str],
        was_prefilling: Sequence[bool],
    ) -> None:  # fmt: skip
        assert self.rule is not None and begun.report is not None
        round_, num_reqs = begun.round_, len(begun.round_.request_ids)
        packed = begun.report.tensor.numpy()
        if begun.runs is not None:
            columns = COLUMNS + BEHIND * bool(round_.drafts.any())
            packed, told = np.split(packed, [-columns * num_reqs])
            told = told.reshape(columns, num_reqs)
            whole, expected = told.view(np.int32).astype(np.int64), told.astype(np.float64)
            names, source = round_.request_ids, self.rule.free_runs
            begun.runs.gaps.told(dict(zip(names, whole[0].tolist(), strict=True)))
            free = source.reported(names, whole[1], whole[2], expected[3])
        round_.fill(Report.of(packed, num_reqs, len(self.tail.widths)))
        if begun.runs is not None:
            behind = source.of_device(whole[-3], whole[-2], expected[-1])
            round_.free = free.joined(behind, round_.drafts)
        step = {
            "draft_seconds": self._clock.seconds(begun.start, begun.end),
            "read": begun.read,
        }
        rest = self._clock.seconds(begun.end, next_start)
        known = _outcomes(round_, request_ids, was_prefilling, outcomes.tolist())
        self.finish(round_, step, known, len(request_ids), rest)


def _outcomes(
    round_: CostAwareRound, request_ids: Sequence[str], was_prefilling: Sequence[bool], outcomes: list[list[int]]
) -> dict[str, tuple[int, int]]:
    """Request id -> candidates verified and accepted, of those of the round that the next step verified.

    Args:
        round_: as it was drafted.
        request_ids, was_prefilling: of the next step.
        outcomes: [num_reqs] its tokens sampled, and booked candidates rejected.
    """
    submitted = dict(zip(round_.request_ids, round_.submitted.tolist(), strict=True))
    found = {}
    rows = zip(request_ids, was_prefilling, outcomes, strict=True)
    for request_id, was_prompt, (num_sampled, num_rejected) in rows:
        if request_id in submitted and num_sampled and not was_prompt:
            # The scheduler may submit fewer than were drafted, or book room for more.
            booked = num_sampled - 1 + num_rejected
            found[request_id] = min(submitted[request_id], booked), num_sampled - 1
    return found
