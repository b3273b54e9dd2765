# SPDX-License-Identifier: Apache-2.0
"""A watch over the adaptive rule: what would fixed candidate lengths, and none, have yielded on the same rounds?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_MEMORY = 160.0
_MIN_ROUNDS = 64.0
_MARGIN = 0.03
_SIGMAS = 2.0
_HOLD, _MAX_HOLD, _MAX_HOLD_OFF = 64, 2048, 256
"""Rounds that the better length is used for; doubled each time that the adaptive rule loses again."""
_JUDGE_EVERY = 8
"""Rounds between two comparisons."""


class Guard:
    """Yields to a fixed candidate length while that is predicted to be faster than the adaptive rule.

    On every drafted round, fixed K would have emitted min(A, K) + 1 tokens, A the accepted ones. If all L candidates
    were accepted and K > L, A is censored: the calibrated acceptance of what would have followed continues it. Seconds
    are the cost model's for both sides. A length must win by 3 % and by two standard errors, over a hundred rounds.

    While a length is held, rounds are drafted with it, and compared with the other lengths in the same way: once one of
    them wins, or the time is up, the adaptive rule starts with a clean record. A length that is held again is held
    twice as long; a full window without a loss shortens that. K = 0 shows nothing of the others and is never held long.

    Args:
        max_length: the largest K compared.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self._hold = _HOLD
        self._left = 0
        self._updates = 0
        self._length: int | None = None
        self._clear()

    def _clear(self) -> None:
        self._rounds = 0.0
        self._tokens = self._seconds = 0.0
        # Of each length, faded sums: tokens, seconds, gain over the adaptive rule, gain squared.
        self._sums = np.zeros((4, self.max_length + 1))

    @property
    def length(self) -> int | None:
        """The fixed length to use now; None: the adaptive rule."""
        return self._length

    def tick(self) -> int | None:
        """One round begins: returns :attr:`length` for it."""
        if self._length is not None:
            self._left -= 1
            if self._left < 0:
                self._release()
        return self._length

    def _release(self) -> None:
        self._length = None
        self._clear()

    def update(self, tokens: float, seconds: float, alt_tokens: Array, alt_seconds: Array) -> None:
        """Take in a round that was drafted, by the adaptive rule or with the length held.

        Args:
            tokens: emitted.
            seconds: the cost model's.
            alt_tokens: [max_length + 1] what candidate length 0, 1, ... would have emitted.
            alt_seconds: [max_length + 1] the cost model's for them.
        """
        keep = 1 - 1 / _MEMORY
        self._rounds = keep * self._rounds + 1
        self._tokens = keep * self._tokens + tokens
        self._seconds = keep * self._seconds + seconds
        # Tokens that the other would have won in the seconds it takes, at the adaptive rule's own rate.
        rate = self._tokens / self._seconds
        gain = alt_tokens - rate * alt_seconds - (tokens - rate * seconds)
        self._sums *= keep
        self._sums += (alt_tokens, alt_seconds, gain, gain * gain)
        self._updates += 1
        if self._rounds >= _MIN_ROUNDS and self._updates % _JUDGE_EVERY == 0:
            self._judge(rate)

    def rival(self) -> int | None:
        """The best of the fixed lengths from 1 on; None before there is much to say, or while one is held."""
        if self._length is not None or self._rounds < _MIN_ROUNDS:
            return None
        return 1 + int((self._sums[0, 1:] / self._sums[1, 1:]).argmax())

    def _judge(self, rate: float) -> None:
        alt_tokens, alt_seconds, gain, square = self._sums
        mean = gain / self._rounds
        error = np.sqrt(np.maximum(square / self._rounds - mean * mean, 0) / self._rounds)
        rates = alt_tokens / alt_seconds
        better = (rates > (1 + _MARGIN) * rate) & (mean > _SIGMAS * error)
        if better.any():
            if self._length is not None:
                self._release()
                return
            self._length = int(np.where(better, rates, 0).argmax())
            self._left = self._hold if self._length else min(self._hold, _MAX_HOLD_OFF)
            self._hold = min(2 * self._hold, _MAX_HOLD)
            self._clear()
        elif self._length is None and self._rounds >= 0.75 * _MEMORY:  # a full window without a loss
            self._hold = max(_HOLD, self._hold - _JUDGE_EVERY)


def fixed_tokens(
    accepted: Sequence[int], verified: Sequence[int], censored: Sequence[int], following: Array, limits: Sequence[int]
) -> Array:
    """Tokens that fixed candidate lengths would have emitted on these rounds.

    Args:
        accepted: [n] accepted candidates.
        verified: [n] verified ones.
        censored: [m] requests, all of whose candidates were accepted.
        following: [m, max_length] acceptance of the candidates that would have come next, each given those before.
        limits: [n] candidates that the request could have had.

    Returns:
        [max_length + 1], summed over the n requests; index 0 is n.
    """
    max_length = following.shape[1]
    wins = np.bincount(accepted, minlength=max_length + 1)  # [longest + 1] requests with so many accepted
    more = (len(accepted) - np.add.accumulate(wins) + wins)[: max_length + 1].astype(np.float64)  # at least so many
    if len(censored):
        ahead = np.arange(1, max_length + 1)
        position = np.array([verified[i] for i in censored])[:, None] + ahead
        room = np.array([limits[i] for i in censored])[:, None]
        survival = np.multiply.accumulate(following, axis=1) * (position <= room)
        more += np.bincount(position.ravel(), survival.ravel(), minlength=max_length + 1)[: max_length + 1]
    return np.add.accumulate(more)
