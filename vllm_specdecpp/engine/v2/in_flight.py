# SPDX-License-Identifier: Apache-2.0
"""Accounting of rounds without waiting for the device: what a step has to tell is copied behind it and read later."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_specdecpp.engine.shared.round_log import RoundLog


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
    numbers: torch.Tensor  # [num_reqs, 3 + num_speculative_steps] int64: sampled, rejected, last token, candidates
    copied: Any  # event after the copy of ``numbers`` to the host, None on a CPU


class DeferredRounds:
    """Feeds a :class:`RoundLog` from copies that have arrived.

    Args:
        trace_rounds: as in ``RoundLog``.
    """

    def __init__(self, trace_rounds: int = 0) -> None:
        self.log = RoundLog(trace_rounds)
        self._pending: deque[_Step] = deque()
        self._last: _Step | None = None
        self._candidates: dict[str, list[int]] = {}  # request id -> what was submitted in its last round

    def step(
        self,
        request_ids: Sequence[str],
        was_prefilling: Sequence[bool],
        finished: list[str],
        numbers: torch.Tensor,
        num_passes: int | torch.Tensor,
    ) -> None:
        """Note one step of the engine; its fields are those of ``_Step``. Does not wait."""
        copied = None
        if numbers.device.type != "cpu":
            if isinstance(num_passes, torch.Tensor):
                num_passes = num_passes.to("cpu", non_blocking=True)
            numbers = numbers.to("cpu", non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._last = _Step(list(request_ids), list(was_prefilling), finished, num_passes, numbers, copied)
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
        for _ in range(int(step.num_passes)):
            self.log.draft_pass()
        for index, request_id in enumerate(step.request_ids):
            num_sampled, num_rejected, next_token = step.numbers[index, :3].tolist()
            before = self._candidates.pop(request_id, None)
            if before is not None and num_sampled and not step.was_prefilling[index]:
                # The scheduler may submit fewer than were drafted, or book room for more.
                verified = before[: num_sampled - 1 + num_rejected]
                self.log.verified(request_id, verified, num_sampled - 1, next_token)
            if num_sampled:
                self._candidates[request_id] = drafted[index]
        for request_id in step.finished:
            self._candidates.pop(request_id, None)


def _drafted(step: _Step) -> list[list[int]]:
    """Each request's candidates: the row up to its first -1."""
    rows: list[list[int]] = step.numbers[:, 3:].tolist()
    return [row[: row.index(-1)] if -1 in row else row for row in rows]
