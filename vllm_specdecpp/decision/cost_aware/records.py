# SPDX-License-Identifier: Apache-2.0
"""How often the draft model is right: for each request, and for a request of which nothing is known."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_MEAN, _WEIGHT = 0.7, 4.0
"""Before anything was seen: acceptance, and how many looks that is worth."""
_MEMORY = 600.0
"""Looks that the common mean remembers."""
_OWN = 12.0
"""Looks of its own after which a request counts as much as all the others."""
_OWN_MEMORY = 60.0
_SPREAD = 0.15
"""Standard deviation of the acceptance between requests."""
_FADE = 0.999
"""What evidence still weighs after each round in which nobody drafts: the text may have changed."""


class Records:
    """Acceptance of a candidate given that those before it were accepted, by request.

    A look is a candidate whose chance was estimated, whether or not it was submitted. What was observed of it counts as
    it is, the rest as estimated. So a rule that leaves out what looks poor does not make its text look better.

    Args:
        max_requests: how many requests are remembered; the one seen longest ago is forgotten.
    """

    def __init__(self, max_requests: int = 1024) -> None:
        self.max_requests = max_requests
        self.mean, self.looks = _MEAN, _WEIGHT
        self._requests: OrderedDict[str, tuple[float, float]] = OrderedDict()  # id -> mean, looks

    @property
    def known(self) -> float:
        """Looks that the common mean rests on."""
        return self.looks - _WEIGHT

    def of(self, request_ids: Sequence[str]) -> tuple[Array, Array]:
        """Acceptance of each request and its standard error: [num_reqs] each."""
        found = [self._requests.get(name, (0.0, 0.0)) for name in request_ids]
        own, looks = np.array(found, dtype=np.float64).reshape(-1, 2).T
        mean = (looks * own + _OWN * self.mean) / (looks + _OWN)
        common = self.mean * (1 - self.mean) / self.looks
        return mean, np.sqrt(common + _SPREAD**2 * _OWN / (looks + _OWN))

    def update(self, request_ids: Sequence[str], looks: Sequence[float], right: Sequence[float]) -> None:
        """Take in a drafted round.

        Args:
            request_ids: [n] that drafted.
            looks: [n] candidates of each that were looked at and follow accepted ones only.
            right: [n] how many of those were accepted, or would have been as far as is known.
        """
        for name, num, won in zip(request_ids, looks, right, strict=True):
            if num <= 0:
                continue
            mean, weight = self._requests.pop(name, (0.0, 0.0))
            weight = min(weight + num, max(_OWN_MEMORY, num))
            self._requests[name] = mean + (won - num * mean) / weight, weight
            self.looks = min(self.looks + num, max(_MEMORY, num))
            self.mean += (won - num * self.mean) / self.looks
        while len(self._requests) > self.max_requests:
            self._requests.popitem(last=False)

    def fade(self) -> None:
        """A round was served in which nobody drafted: less is known of what drafting would bring now."""
        self.looks = max(_FADE * self.looks, _WEIGHT)

    def state(self) -> dict[str, Any]:
        """What the next start of the same pair may take up."""
        return {"mean": self.mean, "looks": self.looks}

    def restore(self, state: dict[str, Any], weight: float = 1.0) -> None:
        """Take up :meth:`state`; ``weight`` in [0, 1] says how much it still counts."""
        mean, looks = float(state["mean"]), float(state["looks"])
        if 0 <= mean <= 1 and math.isfinite(looks):
            self.mean, self.looks = mean, max(_WEIGHT, weight * looks)
