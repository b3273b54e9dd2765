# SPDX-License-Identifier: Apache-2.0
"""Counts what was submitted and what became of it; vLLM's own counters cannot see unsubmitted or skipped drafts."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger("vllm.specdecpp")

ALARM_AFTER = 2000
"""Candidates in vain: poor text has its lucky guesses, garbage has none."""


Counts = Counter[tuple[str, str]]
"""(name, label) -> how often since the start; the names are those of ``engine.metrics``."""

RUN = "run:"
"""Before the name of a source, of a free run."""


def why_stopped(length: int, limit: int, is_last: bool, source: str = "") -> str:
    """Why a round has so many candidates.

    Args:
        length: its candidates.
        limit: as many as it might have.
        is_last: the last candidate ends the request.
        source: of a free run that ends it, else "".
    """
    if source:
        return RUN + source
    if not length:
        return "not_worth" if limit else "off"
    if is_last:
        return "stop_token"
    return "limit" if length >= limit else "rule"


class RoundLog:
    """Counters of verified rounds, and the last few rounds themselves.

    Args:
        trace_rounds: rounds that are kept for :meth:`rounds`; 0 keeps counters only.
        clock: seconds from any start.
    """

    def __init__(self, trace_rounds: int = 0, clock: Callable[[], float] = time.perf_counter) -> None:
        self._trace: deque[dict[str, Any]] = deque(maxlen=trace_rounds)
        self._clock = clock
        self._in_vain = 0  # candidates since one was accepted
        self._last_end: float | None = None
        self.counts: Counts = Counter()
        self._before: Counts = Counter()  # the last reset
        self._requests: dict[str, str | None] = {}  # that are served: what became of their drafts, None: no round yet

    def resize(self, trace_rounds: int) -> None:
        """Keep the last ``trace_rounds`` rounds from now on."""
        self._trace = deque(self._trace, maxlen=trace_rounds)

    def draft_pass(self) -> None:
        """One forward pass of the draft model, over any number of sequences."""
        self.counts["draft_passes", ""] += 1

    def left_out(self, num_passes: int) -> None:
        """So many passes fewer were run in a step than the engine's upper bound allows."""
        self.counts["draft_passes_saved", ""] += max(num_passes, 0)

    def booked(self, num_rows: int) -> None:
        """So many rows of a verification were booked, and counted by vLLM as candidates, beyond what was submitted."""
        self.counts["booked_rows", ""] += num_rows

    def arrived(self, request_id: str, why_plain: str | None) -> None:
        """A request has come, or come back; ``why_plain``: why nothing is drafted for it, None if something may be."""
        self._requests.setdefault(request_id, why_plain)

    def beyond_draft(self, request_ids: Iterable[str]) -> None:
        """These requests are beyond the draft model's last position."""
        self._requests.update((name, "beyond_draft") for name in request_ids if name in self._requests)

    def finished(self, request_ids: Iterable[str]) -> None:
        """These requests have ended."""
        for name in request_ids:
            if name in self._requests:
                self.counts["requests", self._requests.pop(name) or "no_round"] += 1

    @contextmanager
    def step(self) -> Iterator[dict[str, Any]]:
        """The time of one batch's drafting; the device must have been waited for at both ends.

        Yields:
            ``since_last_seconds``: from the end of the drafting before to the start of this one (scheduling, the
            target's pass, sampling, idle time); None for the first. In the end also ``passes`` of the draft model and
            ``draft_seconds``.
        """
        start, passes = self._clock(), self.counts["draft_passes", ""]
        step: dict[str, Any] = {"since_last_seconds": None if self._last_end is None else start - self._last_end}
        yield step
        self._last_end = self._clock()
        step |= {"passes": self.counts["draft_passes", ""] - passes, "draft_seconds": self._last_end - start}

    def verified(
        self, request_id: str, candidates: list[int], accepted: int, next_token: int, stop: str = "rule",
        num_drafted: int = 0,
    ) -> None:  # fmt: skip
        """One request's round has been verified.

        Args:
            request_id: vLLM's request id.
            candidates: the candidate tokens that were verified, in order; may be empty.
            accepted: how many of them the target accepted.
            next_token: the recovered token, or the bonus token if all were accepted.
            stop: see :func:`why_stopped`.
            num_drafted: candidates of the draft model in front of a free run.
        """
        source = stop.removeprefix(RUN) if stop.startswith(RUN) else ""
        drafted = min(num_drafted, len(candidates)) if source else len(candidates)
        self.counts["rounds", str(len(candidates))] += 1
        self.counts["candidates", "draft_model"] += drafted
        self.counts["accepted", "draft_model"] += min(accepted, drafted)
        if source:
            self.counts["candidates", source] += len(candidates) - drafted
            self.counts["accepted", source] += max(accepted - drafted, 0)
        self.counts["stops", RUN.rstrip(":") if stop.startswith(RUN) else stop] += 1
        if self._requests.get(request_id, "") in (None, "not_worth"):
            self._requests[request_id] = "drafted" if candidates else "not_worth"
        before, self._in_vain = self._in_vain, 0 if accepted else self._in_vain + len(candidates)
        if before < ALARM_AFTER <= self._in_vain:
            logger.warning(
                "specdecpp: none of the last %d candidates was accepted: are the draft model's weights those of this "
                "draft? After sleep level 2 they have to be loaded anew",
                self._in_vain,
            )
        if self._trace.maxlen:
            self._trace.append({
                "request_id": request_id, "candidates": candidates, "accepted": accepted, "next_token": next_token,
                "drafted": drafted,
            })  # fmt: skip

    def stats(self, reset: bool = False) -> dict[str, Any]:
        """``rounds``, ``candidates``, ``accepted``, ``draft_passes``, ``emitted`` (accepted, recovered and bonus
        tokens) and ``lengths`` (candidate length → rounds)."""
        sums: Counter[str] = Counter()
        lengths = {}
        for (name, label), count in self.counts.items():
            if new := int(count - self._before[name, label]):
                sums[name] += new
                if name == "rounds":
                    lengths[int(label)] = new
        if reset:
            self._before = self.counts.copy()
        return {
            **{name: sums[name] for name in ("rounds", "candidates", "accepted", "draft_passes")},
            "emitted": sums["accepted"] + sums["rounds"],
            "lengths": dict(sorted(lengths.items())),
        }

    def rounds(self, clear: bool = False) -> list[dict[str, Any]]:
        """The kept rounds, oldest first. ``drafted``: so many candidates are the draft model's, the rest a free run."""
        out = list(self._trace)
        if clear:
            self._trace.clear()
        return out
