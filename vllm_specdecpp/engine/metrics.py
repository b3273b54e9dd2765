# SPDX-License-Identifier: Apache-2.0
"""Counts what was submitted and what became of it; vLLM's own counters cannot see unsubmitted or skipped drafts."""

from __future__ import annotations

from collections import Counter, deque
from typing import Any


class RoundLog:
    """Counters of verified rounds, and the last few rounds themselves.

    Args:
        trace_rounds: how many rounds to keep for :meth:`rounds`; 0 keeps counters only.
    """

    def __init__(self, trace_rounds: int = 0) -> None:
        self._trace: deque[dict[str, Any]] = deque(maxlen=trace_rounds)
        self._reset()

    def _reset(self) -> None:
        self._rounds = self._candidates = self._accepted = self._draft_passes = 0
        self._lengths: Counter[int] = Counter()

    def resize(self, trace_rounds: int) -> None:
        """Keep the last ``trace_rounds`` rounds from now on."""
        self._trace = deque(self._trace, maxlen=trace_rounds)

    def draft_pass(self) -> None:
        """One forward pass of the draft model, over any number of sequences."""
        self._draft_passes += 1

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
