# SPDX-License-Identifier: Apache-2.0
"""How many tokens a request will still emit, as far as those before it tell."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_MEAN, _MEMORY = 100.0, 64.0
"""Tokens of an output before any has ended, which counts as one request; requests that the mean remembers."""


class OutputLengths:
    """Mean output length of the requests that have left the batch."""

    def __init__(self) -> None:
        self._emitted: dict[str, int] = {}
        self._mean, self._weight = _MEAN, 1.0

    def update(self, emitted: Mapping[str, int]) -> None:
        """Call once a round, with the whole batch: request id -> tokens that it has emitted."""
        for request_id in self._emitted.keys() - emitted.keys():
            self._weight = min(self._weight + 1, _MEMORY)
            self._mean += (self._emitted[request_id] - self._mean) / self._weight
        self._emitted = dict(emitted)

    def remaining(self, request_id: str, room: int) -> float:
        """Tokens that a request of the last :meth:`update` will emit after its next one: what the usual request would,
        but at least as many as it has emitted, and at most ``room``."""
        emitted = self._emitted[request_id]
        return min(room, max(self._mean - emitted, emitted))

    def state(self) -> dict[str, Any]:
        """What the next start may take up."""
        return {"mean": self._mean, "weight": self._weight}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up :meth:`state`."""
        mean, weight = float(state["mean"]), float(state["weight"])
        if mean > 0 and math.isfinite(mean) and 1 <= weight <= _MEMORY:
            self._mean, self._weight = mean, weight
