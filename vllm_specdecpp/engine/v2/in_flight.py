# SPDX-License-Identifier: Apache-2.0
"""Accounting of rounds without waiting for the device: what a step has to tell is copied behind it and read later."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_specdecpp.engine.shared.round_log import Counts, RoundLog, why_stopped
from vllm_specdecpp.source_registry import ON_DEVICE

COLUMNS = 5
"""Of a step's numbers, before the candidates."""


class HostCopy:
    """A tensor that is on its way to the host, behind what is queued on the device.

    Args:
        source: [...] on any device; must not change before the copy is here, if that is the host.
    """

    def __init__(self, source: torch.Tensor) -> None:
        self.tensor = source
        self._copied: Any = None
        if source.device.type != "cpu":
            self.tensor = source.to("cpu", non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def is_here(self) -> bool:
        """Whether :attr:`tensor` may be read; does not wait."""
        return self._copied is None or bool(self._copied.query())


@dataclass
class _Step:
    request_ids: list[str]
    was_prefilling: list[bool]  # before the target's pass: nothing drafted was verified by it
    finished: list[str]
    num_passes: int | torch.Tensor  # of the draft model
    numbers: torch.Tensor
    """[num_reqs, COLUMNS + num_speculative_steps] int64: tokens sampled, rejected, the last one; the upper bound on the
    candidates; how many of them are a free run's; the candidates."""
    copied: Any  # event after the copy of ``numbers`` to the host, None on a CPU
    stop_token_ids: Any  # [num_reqs, num_stop_tokens], padded with -1; None: none


class DeferredRounds:
    """Feeds a :class:`RoundLog` from copies that have arrived.

    Args:
        trace_rounds: as in ``RoundLog``.
    """

    def __init__(self, trace_rounds: int = 0) -> None:
        self.log = RoundLog(trace_rounds)
        self._pending: deque[_Step] = deque()
        self._last: _Step | None = None
        self._candidates: dict[str, tuple[list[int], str]] = {}  # request id -> its last round's, and why not more

    def step(
        self,
        request_ids: Sequence[str],
        was_prefilling: Sequence[bool],
        finished: list[str],
        numbers: torch.Tensor,
        num_passes: int | torch.Tensor,
        stop_token_ids: Any = None,
    ) -> None:
        """Note one step of the engine; its fields are those of ``_Step``. Does not wait."""
        copied = None
        if numbers.device.type != "cpu":
            if isinstance(num_passes, torch.Tensor):
                num_passes = num_passes.to("cpu", non_blocking=True)
            numbers = numbers.to("cpu", non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._last = _Step(
            list(request_ids), list(was_prefilling), finished, num_passes, numbers, copied, stop_token_ids
        )  # fmt: skip
        self._pending.append(self._last)
        self.drain(wait=False)

    def drain(self, wait: bool) -> None:
        """Account for the steps whose numbers have arrived, or, if ``wait``, for all of them."""
        while self._pending:
            copied = self._pending[0].copied
            if copied is not None:
                if wait:
                    copied.synchronize()
                elif not copied.query():
                    return
            self._account(self._pending.popleft())

    @property
    def counts(self) -> Counts:
        """See ``RoundLog``."""
        return self.log.counts

    def arrived(self, request_id: str, why_plain: str | None) -> None:
        """See ``RoundLog.arrived``."""
        self.log.arrived(request_id, why_plain)

    def is_settled(self) -> bool:
        """Whether all steps are accounted for; does not wait."""
        self.drain(wait=False)
        return not self._pending

    def candidates(self, request_ids: Sequence[str]) -> list[list[int]]:
        """What each request submitted in the last step; waits until that step's drafting is done."""
        if self._last is None:
            return [[] for _ in request_ids]
        if self._last.copied is not None:
            self._last.copied.synchronize()
        drafted = dict(zip(self._last.request_ids, _drafted(self._last), strict=True))
        return [drafted.get(request_id, []) for request_id in request_ids]

    def stats(self, reset: bool = False) -> dict[str, Any]:
        """See ``RoundLog.stats``; waits for the device."""
        self.drain(wait=True)
        return self.log.stats(reset=reset)

    def rounds(self, clear: bool = False) -> list[dict[str, Any]]:
        """See ``RoundLog.rounds``; waits for the device."""
        self.drain(wait=True)
        return self.log.rounds(clear=clear)

    def resize(self, trace_rounds: int) -> None:
        """See ``RoundLog.resize``; waits for the device."""
        self.drain(wait=True)
        self.log.resize(trace_rounds)

    def _account(self, step: _Step) -> None:
        drafted = _drafted(step)
        stops = [[]] * len(drafted) if step.stop_token_ids is None else step.stop_token_ids.tolist()
        if step.numbers[:, 0].any():
            self.log.left_out(step.numbers.shape[1] - COLUMNS - int(step.num_passes))
        for _ in range(int(step.num_passes)):
            self.log.draft_pass()
        for index, request_id in enumerate(step.request_ids):
            num_sampled, num_rejected, next_token, limit, ran = step.numbers[index, :COLUMNS].tolist()
            before, stop = self._candidates.pop(request_id, (None, ""))
            if before is not None and num_sampled and not step.was_prefilling[index]:
                # The scheduler may submit fewer than were drafted, or book room for more.
                booked = num_sampled - 1 + num_rejected
                verified = before[:booked]
                self.log.booked(booked - len(verified))
                self.log.verified(request_id, verified, num_sampled - 1, next_token, stop)
            if num_sampled:
                mine = drafted[index]
                ends = bool(mine) and mine[-1] in stops[index]
                why = why_stopped(len(mine), limit, ends, ON_DEVICE[0] if ran else "")
                self._candidates[request_id] = mine, why
        self.finish(step.finished)

    def finish(self, request_ids: Sequence[str]) -> None:
        """These requests have ended, and all their steps are accounted for."""
        for request_id in request_ids:
            self._candidates.pop(request_id, None)
        self.log.finished(request_ids)


def _drafted(step: _Step) -> list[list[int]]:
    """Each request's candidates: the row up to its first -1."""
    rows: list[list[int]] = step.numbers[:, COLUMNS:].tolist()
    return [row[: row.index(-1)] if -1 in row else row for row in rows]
