# SPDX-License-Identifier: Apache-2.0
"""How often the draft model is right: for each request, and for a request of which nothing is known."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

_MEAN, _WEIGHT = 0.7, 4.0
"""Before anything was seen: acceptance, and how many looks that is worth."""
_MEMORY = 600.0
"""Looks that the common mean remembers."""
_OWN, _OWN_MEMORY = 12.0, 60.0
"""Looks of its own after which a request counts as much as all the others, and that it remembers."""
_FADE = 0.99
"""What a request's own looks still weigh after each round in which it did not draft: its text may have changed."""
EASY, _SHARE = 0.95, 0.1
"""Acceptance of an easy request, and what share of all requests is taken to be easy, whatever the others were like."""
_HOPE = 0.03
"""A request is hoped to be easy while that is more likely than this."""
_SURE = 0.98
"""Acceptance that nothing is taken to exceed."""


class Records:
    """Acceptance of a candidate given that those before it were accepted, by request.

    A look is a candidate whose chance was estimated, whether or not it was submitted. What was observed of it counts as
    it is, the rest as estimated. So a rule that leaves out what looks poor does not make its text look better.

    A request is like all the others, or easy. By its own looks the one or the other becomes more likely (Bayes), and
    its own acceptance is drawn to that of the one or the other.

    Args:
        max_requests: how many requests are remembered; the one seen longest ago is forgotten.
    """

    def __init__(self, max_requests: int = 1024) -> None:
        self.max_requests = max_requests
        self.mean, self.looks = _MEAN, _WEIGHT
        self._apart = np.zeros(2)  # looks, accepted, of constrained requests
        self._requests: OrderedDict[str, tuple[float, float, int]] = OrderedDict()  # id -> looks, accepted, round
        self._round = 0

    @property
    def known(self) -> float:
        """Looks that the common mean rests on."""
        return self.looks - _WEIGHT

    def known_of(self, constrained: bool) -> float:
        """Looks that what is expected of a batch without own looks rests on; ``constrained``: all of it."""
        return self.known + (float(self._apart[0]) if constrained else 0.0)

    def usual(self, constrained: bool) -> float:
        """Acceptance of a request of its kind: the constrained ones are like all others until they have been looked
        at."""
        apart = float((self._apart[1] + _OWN * self.mean) / (self._apart[0] + _OWN)) if constrained else self.mean
        return min(apart, _SURE)

    def of(self, request_ids: Sequence[str], constrained: Sequence[bool] = ()) -> tuple[Array, Array]:
        """Acceptance of each request as expected, and what may be hoped for: [num_reqs] each.

        ``constrained``: [num_reqs], nobody if it is not given. A request is like the others of its kind.
        """
        found = [self._requests.get(name, (0.0, 0.0, self._round)) for name in request_ids]
        looks, won, seen = np.array(found, dtype=np.float64).reshape(-1, 3).T
        keep = _FADE ** (self._round - seen)
        looks, won = keep * looks, keep * won
        usual: Any = self.usual(False)
        if any(constrained):
            usual = np.where(constrained, self.usual(True), usual)
        odds = math.log(_SHARE / (1 - _SHARE)) + won * np.log(EASY / usual)
        odds += (looks - won) * np.log((1 - EASY) / (1 - usual))
        easy = 1 / (1 + np.exp(-np.minimum(np.maximum(odds, -30), 30)))
        # Before its first look a request is expected to be like the others, and hoped to be easy.
        start = usual + easy * looks / (looks + 1) * np.maximum(EASY - usual, 0.0)
        mean = np.minimum((won + _OWN * start) / (looks + _OWN), _SURE)
        return mean, np.where(easy > _HOPE, np.maximum(mean, EASY), mean)

    def update(
        self, request_ids: Sequence[str], looks: Sequence[float], accepted: Sequence[float],
        constrained: Sequence[bool] = (),
    ) -> None:  # fmt: skip
        """Take in a drafted round.

        Args:
            request_ids: [n] that drafted.
            looks: [n] candidates of each that were looked at and follow accepted ones only.
            accepted: [n] how many of those were accepted, or would have been as far as is known.
            constrained: [n] requests that tell of their kind alone; empty: none.
        """
        apart = constrained or [False] * len(request_ids)
        for name, num, won, is_apart in zip(request_ids, looks, accepted, apart, strict=True):
            if num <= 0:
                continue
            weight, sum_won, seen = self._requests.pop(name, (0.0, 0.0, self._round))
            keep = _FADE ** (self._round - seen) * min(1.0, max(_OWN_MEMORY - num, 0.0) / max(weight, 1e-9))
            self._requests[name] = keep * weight + num, keep * sum_won + won, self._round + 1
            if is_apart:
                self._apart = self._apart * min(1.0, _MEMORY / (self._apart[0] + num)) + (num, won)
                continue
            self.looks = min(self.looks + num, max(_MEMORY, num))
            self.mean += (won - num * self.mean) / self.looks
        while len(self._requests) > self.max_requests:
            self._requests.popitem(last=False)

    def served(self) -> None:
        """A round was served, whether or not somebody drafted."""
        self._round += 1

    def state(self) -> dict[str, Any]:
        """What the next start of the same pair may take up."""
        return {"mean": self.mean, "looks": self.looks}

    def restore(self, state: Mapping[str, Any], weight: float = 1.0) -> None:
        """Take up :meth:`state`; ``weight`` in [0, 1] says how much it still counts.

        Raises:
            ValueError: it is none.
        """
        mean, looks = float(state["mean"]), float(state["looks"])
        if not (0 <= mean <= 1 and _WEIGHT <= looks <= 1e9):
            raise ValueError(f"specdecpp: acceptance {mean} of {looks} looks is none")
        self.mean, self.looks = mean, max(_WEIGHT, weight * looks)
