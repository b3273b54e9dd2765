# SPDX-License-Identifier: Apache-2.0
"""One budget for everything that is tried without being expected to pay."""

from __future__ import annotations

import math

_SHARE = 0.005
"""Of all time, what trials may lose in the long run."""
_OPENING = 24.0
"""Rounds without drafting of one request whose time the first trials may lose, before anything is known, and the most
that is saved. Of a batch the square root: a round of it tells more."""


class Purse:
    """Seconds that trials may lose: first looks at requests, and looks after a long time off.

    An opening sum and a fixed share of all time go in. What a trial lost against not trying comes out, what it won goes
    back. So the whole of what is tried costs at most the opening sum and that share, whatever the text is like.

    Attributes:
        balance: seconds.
    """

    def __init__(self, share: float = _SHARE, opening: float = _OPENING) -> None:
        self._share, self._opening = share, opening
        self.balance = 0.0
        self._most = 0.0

    def open(self, num_reqs: int, off_seconds: float) -> None:
        """A round begins.

        Args:
            num_reqs: in the batch; the more there are, the more a trial tells.
            off_seconds: a round without drafting.
        """
        most = self._opening / math.sqrt(num_reqs) * off_seconds
        if most > self._most:  # the first round, or larger batches than ever
            self.balance += most - self._most
            self._most = most

    def earn(self, seconds: float) -> None:
        """A round has been served in so many seconds."""
        self.balance = min(self.balance + self._share * seconds, self._most)

    def affords(self, seconds: float) -> bool:
        """Whether a trial may be begun that loses so much."""
        return seconds <= self.balance

    def stake(self, seconds: float) -> float:
        """A trial has begun that may lose so much; returns what is taken for it until :meth:`settle`."""
        staked = max(seconds, 0.0)
        self.balance -= staked
        return staked

    def settle(self, lost: float, staked: float) -> None:
        """A trial has ended; ``lost`` seconds, below 0 if it won, of which ``staked`` are taken."""
        self.balance = min(self.balance + staked - lost, self._most)
