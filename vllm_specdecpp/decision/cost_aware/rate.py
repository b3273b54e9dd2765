# SPDX-License-Identifier: Apache-2.0
"""rho: the engine's tokens per second lately, the price of a second in the stop rule (renewal-reward)."""

from __future__ import annotations

_MEMORY = 128.0
"""Rounds after which an old one counts 1/e."""
_HYSTERESIS = 0.02


class RateEstimate:
    """Tokens per second of recent rounds, for each batch-size bucket, as a multiple of the rate without speculation.

    Seconds are those of the cost model for the round that was run, not the clock's: rho multiplies the cost model's
    seconds in the rule, so that a common error of both cancels, and a prefill or a stall in a step cannot move it.
    The multiple, not the rate, is kept: it stays right while the machine slows down or the batch size moves.
    It is never below 1, since K = 0 yields that much at any time. What decisions read moves only once the estimate is
    2 % off it.
    """

    def __init__(self) -> None:
        self._tokens: dict[int, float] = {}
        self._baseline: dict[int, float] = {}
        self._shown: dict[int, float] = {}

    def speedup(self, num_reqs: int) -> float | None:
        """Tokens over those that K = 0 would have emitted in the same time, >= 1; None before the first round."""
        bucket = _bucket(num_reqs)
        if bucket not in self._tokens:
            if not self._tokens:
                return None
            bucket = min(self._tokens, key=lambda other: abs(other - bucket))
        now = max(1.0, self._tokens[bucket] / self._baseline[bucket])
        shown = self._shown.get(bucket)
        if shown is None or abs(now - shown) > _HYSTERESIS * shown:
            self._shown[bucket] = shown = now
        return shown

    def update(self, num_reqs: int, tokens: float, seconds: float, off_seconds: float) -> None:
        """Take in a round.

        Args:
            num_reqs: requests in the batch.
            tokens: emitted by all of them.
            seconds: the cost model's, for this round.
            off_seconds: the cost model's, for a round without speculation.
        """
        bucket = _bucket(num_reqs)
        keep = 1 - 1 / _MEMORY
        # At first contact: what the nearest bucket knows counts as a few rounds.
        before = self.speedup(num_reqs) or 1.3
        self._tokens[bucket] = keep * self._tokens.get(bucket, 6 * num_reqs * before) + tokens
        self._baseline[bucket] = keep * self._baseline.get(bucket, 6.0 * num_reqs) + seconds / off_seconds * num_reqs


def _bucket(num_reqs: int) -> int:
    """1, 2, 3-4, 5-8, 9-16, ..."""
    return (num_reqs - 1).bit_length()
