# SPDX-License-Identifier: Apache-2.0
"""Counts what was submitted and what became of it; vLLM's own counters cannot see unsubmitted or skipped drafts."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class RoundLog:
    """Counters of verified rounds, and the last few rounds themselves.

    Args:
        trace_rounds: rounds and steps that are kept for :meth:`rounds` and :meth:`step_times`; 0 keeps counters only.
        clock: seconds from any start.
    """

    def __init__(self, trace_rounds: int = 0, clock: Callable[[], float] = time.perf_counter) -> None:
        self._trace: deque[dict[str, Any]] = deque(maxlen=trace_rounds)
        self._step_times: deque[dict[str, Any]] = deque(maxlen=trace_rounds)
        self._clock = clock
        self._last_end: float | None = None
        self._reset()

    def _reset(self) -> None:
        self._rounds = self._candidates = self._accepted = self._draft_passes = 0
        self._lengths: Counter[int] = Counter()

    def resize(self, trace_rounds: int) -> None:
        """Keep the last ``trace_rounds`` rounds and steps from now on."""
        self._trace = deque(self._trace, maxlen=trace_rounds)
        self._step_times = deque(self._step_times, maxlen=trace_rounds)

    def draft_pass(self) -> None:
        """One forward pass of the draft model, over any number of sequences."""
        self._draft_passes += 1

    @contextmanager
    def step(self, num_reqs: int, num_rows: int) -> Iterator[dict[str, Any]]:
        """The time of one batch's drafting; the device must have been waited for at both ends.

        Args:
            num_reqs: requests in the batch.
            num_rows: tokens that the target has just read, the last emitted token of each request among them.

        Yields:
            The step as :meth:`step_times` shows it, so far without ``passes`` and ``draft_seconds``. The caller sets
            ``num_new``: requests that came without a draft, prompts or chunks of them.
        """
        start, passes = self._clock(), self._draft_passes
        since = None if self._last_end is None else start - self._last_end
        step = {"num_reqs": num_reqs, "rows": num_rows, "num_new": 0, "since_last_seconds": since}
        yield step
        end = self._clock()
        step |= {"passes": self._draft_passes - passes, "draft_seconds": end - start}
        if self._step_times.maxlen:
            self._step_times.append(step)
        self._last_end = end

    def verified(self, request_id: str, candidates: list[int], accepted: int, next_token: int) -> None:
        """One request's round has been verified.

        Args:
            request_id: vLLM's request id.
            candidates: the candidate tokens that were verified, in order; may be empty.
            accepted: how many of them the target accepted.
            next_token: the recovered token, or the bonus token if all were accepted.
        """
        self._rounds += 1
        self._candidates += len(candidates)
        self._accepted += accepted
        self._lengths[len(candidates)] += 1
        if self._trace.maxlen:
            self._trace.append(
                {"request_id": request_id, "candidates": candidates, "accepted": accepted, "next_token": next_token}
            )

    def stats(self, reset: bool = False) -> dict[str, Any]:
        """``rounds``, ``candidates``, ``accepted``, ``draft_passes``, ``emitted`` (accepted, recovered and bonus
        tokens) and ``lengths`` (candidate length → rounds)."""
        out = {
            "rounds": self._rounds,
            "candidates": self._candidates,
            "accepted": self._accepted,
            "draft_passes": self._draft_passes,
            "emitted": self._accepted + self._rounds,
            "lengths": dict(sorted(self._lengths.items())),
        }
        if reset:
            self._reset()
        return out

    def rounds(self, clear: bool = False) -> list[dict[str, Any]]:
        """The kept rounds, oldest first."""
        out = list(self._trace)
        if clear:
            self._trace.clear()
        return out

    def step_times(self, clear: bool = False) -> list[dict[str, Any]]:
        """The last steps, oldest first.

        Each has ``num_reqs``, ``rows`` and ``num_new`` (see :meth:`step`), ``passes`` (of the draft model),
        ``draft_seconds`` (the drafting), and ``since_last_seconds`` from the end of the drafting before to the start of
        this one: scheduling, the target's pass and sampling, and idle time if there was any; None for the first step.
        A step with a first pass has ``read`` as well: tokens of each pass that read, if more than two a request.
        """
        out = list(self._step_times)
        if clear:
            self._step_times.clear()
        return out
