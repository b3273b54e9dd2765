# SPDX-License-Identifier: Apache-2.0
"""How many tokens a request will still emit, as far as those before it tell, and how many of them no run will bring."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_MEAN, _MEMORY = 100.0, 64.0
"""Tokens of an output before any has ended, which counts as one request; requests that the mean remembers."""


class OutputLengths:
    """Mean output length of the requests that have left the batch."""

    def __init__(self) -> None:
        self._emitted: dict[str, int] = {}
        self._by_runs: dict[str, int] = {}
        self._mean, self._weight = _MEAN, 1.0

    def update(self, emitted: Mapping[str, int]) -> None:
        """Call once a round, with the whole batch: request id -> tokens that it has emitted."""
        for request_id, num in self._emitted.items():  # in the batch's order: a set's differs between ranks
            if request_id not in emitted:
                self._weight = min(self._weight + 1, _MEMORY)
                self._mean += (num - self._mean) / self._weight
        self._emitted = dict(emitted)
        self._by_runs = {name: num for name, num in self._by_runs.items() if name in emitted}

    def brought(self, request_ids: Sequence[str], tokens: Sequence[int]) -> None:
        """Free runs have brought so many tokens of each request."""
        for request_id, num in zip(request_ids, tokens, strict=True):
            if num > 0:
                self._by_runs[request_id] = self._by_runs.get(request_id, 0) + num

    def remaining(self, request_id: str, room: int, runs: bool = False) -> float:
        """Tokens that a request of the last :meth:`update` will emit after its next one: what the usual request would,
        but at least as many as it has emitted, and at most ``room``.

        With ``runs`` those that no run will bring: nobody knows at the start whether a text repeats itself, so not more
        than no run has brought yet.
        """
        emitted = self._emitted[request_id]
        left = min(room, max(self._mean - emitted, emitted))
        return min(left, emitted - self._by_runs.get(request_id, 0)) if runs else left

    def state(self) -> dict[str, Any]:
        """What the next start may take up."""
        return {"mean": self._mean, "weight": self._weight}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up :meth:`state`."""
        mean, weight = float(state["mean"]), float(state["weight"])
        if mean > 0 and math.isfinite(mean) and 1 <= weight <= _MEMORY:
            self._mean, self._weight = mean, weight
