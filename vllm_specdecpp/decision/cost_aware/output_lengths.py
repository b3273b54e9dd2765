# SPDX-License-Identifier: Apache-2.0
"""How many tokens a request will still emit, as far as those before it tell. No vLLM import."""

from __future__ import annotations

from collections.abc import Mapping

_MEMORY = 64.0
"""Requests that the mean remembers."""
_LEAST = 0.25
"""Part of the mean that a request is given at least, however long it has lasted."""


class OutputLengths:
    """Mean output length of the requests that have left the batch."""

    def __init__(self) -> None:
        self._starts: dict[str, int] = {}  # request id -> position of its first token
        self._emitted: dict[str, int] = {}
        self._mean, self._weight = 0.0, 0.0

    def update(self, next_positions: Mapping[str, int]) -> None:
        """Call once a round. A preempted request counts as one that ended.

        Args:
            next_positions: request id -> position of the token emitted last, of the whole batch.
        """
        emitted = {}
        for request_id, position in next_positions.items():
            start = self._starts.setdefault(request_id, position)
            emitted[request_id] = position - start + 1
        for request_id in self._emitted.keys() - emitted.keys():
            del self._starts[request_id]
            self._weight = min(self._weight + 1, _MEMORY)
            self._mean += (self._emitted[request_id] - self._mean) / self._weight
        self._emitted = emitted

    def remaining(self, request_id: str, room: int) -> float:
        """Tokens that a request of the batch will emit after its next token.

        Args:
            request_id: in the last :meth:`update`.
            room: what it may emit at most; expected before any request has ended.
        """
        if not self._weight:
            return float(room)
        return min(room, max(self._mean - self._emitted[request_id], _LEAST * self._mean))
