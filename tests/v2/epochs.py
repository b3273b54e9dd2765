# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs without CUDA: they belong to a KV cache and to a memory pool, and refuse what a GPU would not forgive."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class DeadGraph(AssertionError):
    """A graph was replayed whose KV cache is gone."""


class Pool:
    """A graph's memory; gone with the last reference."""


class Epochs:
    """Which KV cache is in force; which pools are alive.

    Attributes:
        now: number of the KV cache; 0 while there is none.
        replayed: (kind, epoch) of each replay.
    """

    def __init__(self) -> None:
        self.now = self._count = 0
        self.pools: weakref.WeakSet[Pool] = weakref.WeakSet()
        self.replayed: list[tuple[str, int]] = []

    def begin(self) -> None:
        """A new KV cache."""
        self._count += 1
        self.now = self._count

    def end(self) -> None:
        """The KV cache is freed."""
        self.now = 0


class EpochGraph:
    """Knows the KV cache that it was captured on."""

    def __init__(self, epochs: Epochs, kind: str, pool: Pool) -> None:
        self.epochs, self.kind, self.pool, self.epoch = epochs, kind, pool, epochs.now

    def replay(self) -> None:
        self.epochs.replayed.append((self.kind, self.epoch))
        if self.epoch != self.epochs.now or not self.epochs.now:
            raise DeadGraph(f"a {self.kind} graph of KV cache {self.epoch} was replayed on {self.epochs.now}")


class EpochBackend:
    """A :class:`vllm_specdecpp.engine.v2.graphs.Backend` whose graphs do nothing but check.

    Args:
        epochs: shared by all.
        fail_at: number of the capture that fails, from 1.
        lost: whether the device does not get over it.
    """

    def __init__(self, epochs: Epochs, *, fail_at: int | None = None, lost: bool = False) -> None:
        self.epochs, self.fail_at, self.lost = epochs, fail_at, lost
        self.pool = Pool()
        epochs.pools.add(self.pool)
        self.num_captures = self.num_recovered = 0
        self.capturing = False

    @contextmanager
    def capture(self) -> Iterator[Any]:
        assert not self.capturing, "a capture was left open"
        self.capturing = True
        self.num_captures += 1
        yield EpochGraph(self.epochs, "draft", self.pool)
        if self.num_captures == self.fail_at:  # as torch does, which leaves the allocator in capture mode
            raise RuntimeError("CUDA error: operation failed\ndue to a previous error during capture")
        self.capturing = False

    @contextmanager
    def if_node(self, graph: Any, predicate: torch.Tensor) -> Iterator[None]:
        yield

    def probe(self) -> None:
        with self.capture() as graph, self.if_node(graph, torch.zeros(1, dtype=torch.bool)):
            pass

    def recover(self) -> None:
        self.num_recovered += 1
        self.capturing = False
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def replay(self, graph: EpochGraph) -> None:
        assert not self.capturing, "a replay into an open capture"
        graph.replay()

    def fetch(self, flag: torch.Tensor) -> Callable[[], bool]:
        return lambda: False
