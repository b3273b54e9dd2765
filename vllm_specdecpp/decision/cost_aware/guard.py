# SPDX-License-Identifier: Apache-2.0
"""A watch over the adaptive rule: what would fixed candidate lengths, and none, have yielded on the same rounds?"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_MEMORY = 160.0
_MIN_ROUNDS = 64.0
_MARGIN = 0.03
_SIGMAS = 2.0
_HOLD, _MAX_HOLD = 64, 2048
"""Rounds that the better length is used for; doubled each time that the adaptive rule loses again."""


class Guard:
    """Yields to a fixed candidate length while that is predicted to be faster than the adaptive rule.

    On every drafted round, fixed K would have emitted min(A, K) + 1 tokens, A the accepted ones. If all L candidates
    were accepted and K > L, A is censored: the calibrated acceptance of what would have followed continues it. Seconds
    are the cost model's for both sides. A length must win by 3 % and by two standard errors, over a hundred rounds.

    While a length is held, rounds are drafted with it; afterwards the adaptive rule starts with a clean record. If the
    hold ends without another loss in its first window, its length shrinks back.

    Args:
        max_length: the largest K compared.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self._hold = _HOLD
        self._left = 0
        self._length: int | None = None
        self._clear()

    def _clear(self) -> None:
        self._rounds = 0.0
        self._tokens = self._seconds = 0.0
        shape = self.max_length + 1
        self._alt_tokens, self._alt_seconds = np.zeros(shape), np.zeros(shape)
        self._gain, self._square = np.zeros(shape), np.zeros(shape)

    @property
    def length(self) -> int | None:
        """The fixed length to use now; None: the adaptive rule."""
        return self._length

    def tick(self) -> int | None:
        """One round begins: returns :attr:`length` for it."""
        if self._length is not None:
            self._left -= 1
            if self._left < 0:
                self._length = None
                self._clear()
        return self._length

    def update(self, tokens: float, seconds: float, alt_tokens: Array, alt_seconds: Array) -> None:
        """Take in a round that the adaptive rule drafted.

        Args:
            tokens: emitted.
            seconds: the cost model's.
            alt_tokens: [max_length + 1] what candidate length 0, 1, ... would have emitted.
            alt_seconds: [max_length + 1] the cost model's for them.
        """
        if self._length is not None:
            return
        keep = 1 - 1 / _MEMORY
        self._rounds = keep * self._rounds + 1
        self._tokens = keep * self._tokens + tokens
        self._seconds = keep * self._seconds + seconds
        self._alt_tokens = keep * self._alt_tokens + alt_tokens
        self._alt_seconds = keep * self._alt_seconds + alt_seconds
        # Tokens that the other would have won in the seconds it takes, at the adaptive rule's own rate.
        rate = self._tokens / self._seconds
        gain = alt_tokens - rate * alt_seconds - (tokens - rate * seconds)
        self._gain = keep * self._gain + gain
        self._square = keep * self._square + gain * gain
        if self._rounds >= _MIN_ROUNDS:
            self._judge(rate)

    def _judge(self, rate: float) -> None:
        mean = self._gain / self._rounds
        error = np.sqrt(np.maximum(self._square / self._rounds - mean * mean, 0) / self._rounds)
        rates = self._alt_tokens / self._alt_seconds
        better = (rates > (1 + _MARGIN) * rate) & (mean > _SIGMAS * error)
        if better.any():
            self._length = int(np.where(better, rates, 0).argmax())
            self._left = self._hold
            self._hold = min(2 * self._hold, _MAX_HOLD)
        elif self._rounds >= 0.75 * _MEMORY:  # a full window without a loss
            self._hold = max(_HOLD, self._hold - 1)


def fixed_tokens(accepted: Array, verified: Array, following: Array, max_length: int) -> Array:
    """Tokens that fixed candidate lengths would have emitted on these rounds.

    Args:
        accepted: [n] accepted candidates.
        verified: [n] verified ones.
        following: [n, max_length] acceptance of the candidates after the last verified one, each given those before.
        max_length: the largest K.

    Returns:
        [max_length + 1], summed over the n requests; index 0 is n.
    """
    lengths = np.arange(max_length + 1)
    tokens = np.minimum(accepted[:, None], lengths) + 1.0  # [n, max_length + 1]
    censored = accepted >= verified
    if censored.any():
        extra = np.cumprod(following, axis=1).cumsum(axis=1)  # [n, max_length]
        more = np.clip(lengths - verified[:, None], 0, max_length).astype(np.int64)  # [n, max_length + 1]
        bonus = np.where(more > 0, np.take_along_axis(extra, np.maximum(more - 1, 0), axis=1), 0.0)
        tokens = tokens + np.where(censored[:, None], bonus, 0.0)
    return tokens.sum(axis=0)
