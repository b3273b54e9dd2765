# SPDX-License-Identifier: Apache-2.0
"""What of the captured draft rounds can be shown without a GPU: with a recorder in the place of CUDA."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from vllm_specdecpp.engine.v2.graphs import EAGER, IF_NODES, PER_PASS, DraftGraphs, batch_sizes, choose_mode

BEST: dict[str, Any] = {
    "on_cuda": True, "full_graphs": True, "metadata_in_place": True, "has_if_nodes": True, "num_ranks": 1
}  # fmt: skip


@pytest.mark.parametrize(
    ("worse", "mode", "word"),
    [
        ({}, IF_NODES, "device itself"),
        ({"num_ranks": 2}, PER_PASS, "tensor parallelism"),
        ({"has_if_nodes": False}, PER_PASS, "2.13"),
        ({"metadata_in_place": False}, EAGER, "attention backend"),
        ({"full_graphs": False}, EAGER, "cudagraph_mode"),
        ({"on_cuda": False}, EAGER, "NVIDIA"),
    ],
)
def test_mode_and_reason(worse, mode, word):
    got, reason = choose_mode(**{**BEST, **worse})
    assert got == mode and word in reason


def test_eager_whenever_one_condition_of_every_graph_fails():
    for values in itertools.product([True, False], repeat=4):
        on_cuda, full_graphs, in_place, has_if_nodes = values
        mode, _ = choose_mode(
            on_cuda=on_cuda, full_graphs=full_graphs, metadata_in_place=in_place, has_if_nodes=has_if_nodes, num_ranks=1
        )
        assert (mode == EAGER) == (not all(values[:3]))


@pytest.mark.parametrize(
    ("most", "sizes"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (48, [1, 2, 4, 8, 16, 32, 48])]
)
def test_batch_sizes(most, sizes):
    assert batch_sizes(most) == sizes
    assert batch_sizes(10_000) == [1, 2, 4, 8, 16, 32, 64, 128, 256]


class Recorder:
    """Records calls into "graphs", and runs them at replay, as a device would: IF nodes ask at replay."""

    def __init__(self) -> None:
        self.recording: list[Any] | None = None
        self.queue: list[Any] = []
        self.fetched = 0

    def call(self, function: Callable[[], None]) -> None:
        recording = self.recording
        if recording is None:
            function()
        else:
            recording.append(function)

    @contextmanager
    def capture(self) -> Iterator[Any]:
        assert self.recording is None, "captures do not nest"
        graph: list[Any] = []
        self.recording = graph
        yield graph
        self.recording = None

    @contextmanager
    def if_node(self, graph: Any, predicate: torch.Tensor) -> Iterator[None]:
        owner: list[Any] = graph
        assert self.recording is owner, "an IF node belongs to the graph that is being captured"
        body: list[Any] = []
        self.recording = body
        yield
        self.recording = owner
        owner.append((predicate, body))

    def replay(self, graph: Any) -> None:
        for entry in graph:
            if not isinstance(entry, tuple):
                entry()
            elif bool(entry[0]):
                self.replay(entry[1])

    def fetch(self, flag: torch.Tensor) -> Callable[[], bool]:
        value = bool(flag)

        def wait() -> bool:
            self.fetched += 1
            return value

        return wait


class Batch:
    """A round whose requests stop after ``lengths`` candidates; ``ran`` has (batch size, pass) in order."""

    def __init__(self, backend: Recorder) -> None:
        self.any_running = torch.zeros(1, dtype=torch.bool)
        self.longest = 1
        self.ran: list[tuple[int, int]] = []
        self.prepared: list[int] = []
        self._backend = backend

    def prepare_capture(self, size: int) -> tuple[Callable[[], None], Callable[[int], None]]:
        assert self._backend.recording is None, "a batch is set up outside its graph"
        self.prepared.append(size)

        def run(step: int) -> None:
            def on_device() -> None:
                self.ran.append((size, step))
                self.any_running.fill_(step < self.longest)

            self._backend.call(on_device)

        return (lambda: run(1)), run


def _captured(mode: str, sizes: list[int], max_length: int = 5) -> tuple[Recorder, Batch, DraftGraphs]:
    backend = Recorder()
    batch = Batch(backend)
    graphs = DraftGraphs(batch, mode, sizes, max_length, backend)
    graphs.capture()
    return backend, batch, graphs


@pytest.mark.parametrize("mode", [IF_NODES, PER_PASS])
def test_each_size_is_warmed_up_then_captured_largest_first(mode):
    _, batch, _ = _captured(mode, [1, 4, 2])
    assert batch.prepared == [4, 2, 1, 4, 2, 1]
    assert batch.ran == [(size, step) for size in (4, 2, 1) for step in range(1, 6)]


@pytest.mark.parametrize("longest", range(1, 6))
def test_if_nodes_run_exactly_the_passes_that_are_wanted_and_ask_nobody(longest):
    backend, batch, graphs = _captured(IF_NODES, [1, 4])
    batch.longest = longest
    batch.ran.clear()
    size = graphs.size_for(3)
    assert size == 4
    assert graphs.replay(size, 5) is None
    assert batch.ran == [(4, step) for step in range(1, longest + 1)]
    assert backend.fetched == 0


@pytest.mark.parametrize("mode", [IF_NODES, PER_PASS])
@pytest.mark.parametrize("longest", range(1, 6))
def test_after_a_first_pass_of_its_own_the_later_ones_are_replayed(mode, longest):
    backend, batch, graphs = _captured(mode, [4])
    batch.longest = longest
    batch.any_running.fill_(longest > 1)
    batch.ran.clear()
    num_passes = graphs.replay(4, 5, first=False)
    wanted = longest if mode == IF_NODES else min(longest + 1, 5)
    assert batch.ran == [(4, step) for step in range(2, wanted + 1)]
    assert num_passes == (None if mode == IF_NODES else wanted)
    assert mode == PER_PASS or backend.fetched == 0


@pytest.mark.parametrize("longest", range(1, 6))
def test_a_graph_per_pass_runs_at_most_one_pass_for_nobody(longest):
    backend, batch, graphs = _captured(PER_PASS, [2])
    batch.longest = longest
    batch.ran.clear()
    num_passes = graphs.replay(2, 5)
    assert num_passes == len(batch.ran) == min(longest + 1, 5)
    assert [step for _, step in batch.ran] == list(range(1, num_passes + 1))


@pytest.mark.parametrize(("max_length", "passes"), [(0, 1), (1, 1), (3, 3), (9, 5)])
def test_a_graph_per_pass_stops_at_the_rounds_bound(max_length, passes):
    _, batch, graphs = _captured(PER_PASS, [1])
    batch.longest = 99
    batch.ran.clear()
    assert graphs.replay(1, max_length) == passes == len(batch.ran)


def test_a_batch_beyond_the_largest_size_has_no_graph():
    _, _, graphs = _captured(IF_NODES, [1, 2, 4])
    assert [graphs.size_for(n) for n in (1, 2, 3, 4, 5)] == [1, 2, 4, 4, None]
