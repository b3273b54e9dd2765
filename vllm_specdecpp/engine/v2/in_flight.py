# SPDX-License-Identifier: Apache-2.0
"""Accounting of rounds without waiting for the device: what a step has to tell is copied behind it and read later."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from vllm_specdecpp.engine.shared.round_log import RoundLog, why_stopped
from vllm_specdecpp.source_registry import ON_DEVICE

COLUMNS = 6
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
            self._copied = torch.cuda.Event(blocking=True)  # to spin would hold the driver's lock
            self._copied.record()

    def is_here(self) -> bool:
        """Whether :attr:`tensor` may be read; does not wait."""
        return self._copied is None or bool(self._copied.query())

    def wait(self) -> None:
        """Until it may be read."""
        if self._copied is not None:
            self._copied.synchronize()


class InFlight:
    """The one queue of what is on its way to the host, in the order of the stream, and of who takes it in."""

    def __init__(self) -> None:
        self._queue: deque[tuple[HostCopy, Callable[..., None], tuple[Any, ...]]] = deque()

    def send(self, copy: HostCopy, take: Callable[..., None], *args: Any) -> None:
        """Once the copy is here, ``take(copy.tensor, *args)``."""
        self._queue.append((copy, take, args))

    def settle(self, wait: bool = False) -> None:
        """Let all be taken in that is here, or, if ``wait``, all that was sent."""
        while self._queue and (wait or self._queue[0][0].is_here()):
            copy, take, args = self._queue.popleft()
            if wait:
                copy.wait()
            take(copy.tensor, *args)

    def num(self, take: Callable[..., None]) -> int:
        """How many copies are on their way to ``take``."""
        return sum(theirs == take for _, theirs, _ in self._queue)

    def drop(self, take: Callable[..., None]) -> None:
        """Nothing that is on its way to ``take`` is wanted any more."""
        self._queue = deque(sent for sent in self._queue if sent[1] != take)


class DeferredRounds(RoundLog):
    """A :class:`RoundLog` that is fed from copies that have arrived; same arguments.

    Attributes:
        in_flight: the queue, also of the cost-aware rule and of :class:`.kv.DraftKVGaps`.
    """

    def __init__(self, trace_rounds: int = 0) -> None:
        super().__init__(trace_rounds)
        self.in_flight = InFlight()
        self._last: tuple[Sequence[str], HostCopy] | None = None
        # Request id -> its last round's, why not more, and how many of them the draft model drew.
        self._candidates: dict[str, tuple[list[int], str, int]] = {}

    def note(
        self,
        request_ids: Sequence[str],
        was_prefilling: Sequence[bool],
        finished: list[str],
        numbers: torch.Tensor,
        num_passes: int,
        stop_token_ids: Any = None,
    ) -> None:
        """Note one step of the engine. Does not wait.

        Args:
            request_ids: of the batch.
            was_prefilling: [num_reqs] before the target's pass: nothing drafted was verified by it.
            finished: requests that have ended before the step.
            numbers: [num_reqs, COLUMNS + num_speculative_steps] int64: tokens sampled, rejected; the upper bound
                on the candidates; how many of them are a free run's; passes of the draft model that only the device has
                counted; the last token sampled; the candidates.
            num_passes: of the draft model, besides those.
            stop_token_ids: [num_reqs, num_stop_tokens], padded with -1; None: none.
        """
        request_ids, copy = list(request_ids), HostCopy(numbers)
        self._last = request_ids, copy
        more = list(was_prefilling), finished, num_passes, stop_token_ids
        self.in_flight.send(copy, self._account, request_ids, *more)
        self.in_flight.settle()

    def is_settled(self) -> bool:
        """Whether all steps are accounted for; does not wait."""
        self.in_flight.settle()
        return not self.in_flight.num(self._account)

    def ran(self) -> dict[str, tuple[int, int]]:
        """Request id -> candidates drafted and candidates of a free run in the last step; waits until that step's
        drafting is done."""
        if self._last is None:
            return {}
        names, copy = self._last
        copy.wait()
        runs, candidates = copy.tensor[:, 3].tolist(), map(len, _drafted(copy.tensor))
        return {name: (num - ran, ran) for name, num, ran in zip(names, candidates, runs, strict=True)}

    def candidates(self, request_ids: Sequence[str]) -> list[list[int]]:
        """What each request submitted in the last step; waits until that step's drafting is done."""
        if self._last is None:
            return [[] for _ in request_ids]
        names, copy = self._last
        copy.wait()
        drafted = dict(zip(names, _drafted(copy.tensor), strict=True))
        return [drafted.get(request_id, []) for request_id in request_ids]

    def stats(self, reset: bool = False) -> dict[str, Any]:
        """See ``RoundLog.stats``; waits for the device."""
        self.in_flight.settle(wait=True)
        return super().stats(reset=reset)

    def rounds(self, clear: bool = False) -> list[dict[str, Any]]:
        """See ``RoundLog.rounds``; waits for the device."""
        self.in_flight.settle(wait=True)
        return super().rounds(clear=clear)

    def resize(self, trace_rounds: int) -> None:
        """See ``RoundLog.resize``; waits for the device."""
        self.in_flight.settle(wait=True)
        super().resize(trace_rounds)

    def _account(
        self, numbers: torch.Tensor, request_ids: Sequence[str], was_prefilling: Sequence[bool],
        finished: Sequence[str], num_passes: int, stop_token_ids: Any,
    ) -> None:  # fmt: skip
        """Arguments as in :meth:`note`."""
        drafted = _drafted(numbers)
        passes = num_passes + int(numbers[0, 4])
        stops = [[]] * len(drafted) if stop_token_ids is None else stop_token_ids.tolist()
        if numbers[:, 0].any():
            self.left_out(numbers.shape[1] - COLUMNS - passes)
        for _ in range(passes):
            self.draft_pass()
        rows = zip(request_ids, was_prefilling, numbers[:, :COLUMNS].tolist(), drafted, stops, strict=True)
        for request_id, was_prompt, (num_sampled, num_rejected, limit, ran, _, next_token), mine, ends in rows:
            before, stop, num_drafted = self._candidates.pop(request_id, (None, "", 0))
            if before is not None and num_sampled and not was_prompt:
                # The scheduler may submit fewer than were drafted, or book room for more.
                booked = num_sampled - 1 + num_rejected
                verified = before[:booked]
                self.booked(booked - len(verified))
                self.verified(request_id, verified, num_sampled - 1, next_token, stop, num_drafted)
            if num_sampled:
                why = why_stopped(len(mine), limit, bool(mine) and mine[-1] in ends, ON_DEVICE[0] if ran else "")
                self._candidates[request_id] = mine, why, len(mine) - ran
        self.finished(finished)

    def finished(self, request_ids: Iterable[str]) -> None:
        """See ``RoundLog.finished``; all steps of these requests are accounted for."""
        request_ids = list(request_ids)
        for request_id in request_ids:
            self._candidates.pop(request_id, None)
        super().finished(request_ids)


def _drafted(numbers: torch.Tensor) -> list[list[int]]:
    """Each request's candidates: the row up to its first -1."""
    rows: list[list[int]] = numbers[:, COLUMNS:].tolist()
    return [row[: row.index(-1)] if -1 in row else row for row in rows]
