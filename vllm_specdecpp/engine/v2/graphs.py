# SPDX-License-Identifier: Apache-2.0
"""Draft rounds as CUDA graphs: the first pass in one and all later ones in another, or a graph for each pass, or none.

**Unproven**: no GPU has run this file. What a CPU can show is tested with a recorder in the place of CUDA (the choice
of a mode, what is captured in which order, which graph serves a batch, when a replay ends); ``benchmarks/gpu`` has the
tests and timings for a GPU machine.

* ``if_nodes``: two graphs a batch size. Each later pass stands in a CUDA IF node on the device's own "somebody goes on"
  flag (``CUDAGraph.begin_capture_to_if_node``, torch 2.13), so the host neither waits nor decides.
* ``per_pass``: one graph a pass and batch size. The flag follows each pass to the host, which reads it one pass late:
  the next pass is in the queue by then, so the device never idles, and at most one pass is run for nobody.
* ``eager``: no graphs.

Where a prompt is read in the same step, the first pass has a width of its own and runs eagerly; the later ones are
replayed all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, Protocol

import torch

from vllm_specdecpp.engine.v2.in_flight import HostCopy

IF_NODES, PER_PASS, EAGER = "if_nodes", "per_pass", "eager"

LARGEST_BATCH = 256
"""Beyond this many requests a pass is long enough that launching its kernels one by one costs little. There are at most
9 sizes up to here."""


def choose_mode(
    *, on_cuda: bool, full_graphs: bool, metadata_in_place: bool, has_if_nodes: bool, num_ranks: int
) -> tuple[str, str]:
    """How draft rounds run, and why not better.

    Args:
        on_cuda: whether the draft model is on an NVIDIA GPU.
        full_graphs: whether vLLM captures full graphs of decode steps.
        metadata_in_place: whether the attention backend can refresh its metadata inside a graph.
        has_if_nodes: whether torch can capture IF nodes.
        num_ranks: tensor-parallel size.
    """
    if not on_cuda:
        return EAGER, "CUDA graphs need an NVIDIA GPU"
    if not full_graphs:
        return EAGER, "vLLM's cudagraph_mode has no full graphs of decode steps"
    if not metadata_in_place:
        return EAGER, "the attention backend cannot refresh its metadata inside a graph"
    if not has_if_nodes:
        return PER_PASS, "this torch has no CUDAGraph.begin_capture_to_if_node (2.13 has)"
    if num_ranks > 1:
        return PER_PASS, "IF nodes hold kernels and copies only, not the collectives of tensor parallelism"
    return IF_NODES, "the device itself decides whether a further pass runs"


def batch_sizes(max_num_reqs: int) -> list[int]:
    """The batch sizes to capture: powers of two, and the largest one."""
    largest = min(max_num_reqs, LARGEST_BATCH)
    sizes = [1]
    while sizes[-1] * 2 < largest:
        sizes.append(sizes[-1] * 2)
    return sizes if sizes[-1] == largest else [*sizes, largest]


class Rounds(Protocol):
    """What is captured: a round of a batch of fixed size, on buffers that keep their address."""

    any_running: torch.Tensor
    """[1] bool on the device, whether a further pass is wanted."""

    def prepare_capture(self, size: int) -> tuple[Callable[[], None], Callable[[int], None]]:
        """Set up a batch of ``size``; gives the first pass, and pass k = 2, 3, ... as functions without a host wait."""


class Backend(Protocol):
    """CUDA, or what stands for it in a test."""

    def capture(self) -> AbstractContextManager[Any]:
        """Record what runs inside into a new graph, which is what the context yields."""

    def if_node(self, graph: Any, predicate: torch.Tensor) -> AbstractContextManager[None]:
        """Inside :meth:`capture`: what runs here runs at replay only if ``predicate`` ([1] bool) holds by then."""

    def replay(self, graph: Any) -> None:
        """Queue a graph; does not wait."""

    def fetch(self, flag: torch.Tensor) -> Callable[[], bool]:
        """Send ``flag`` ([1] bool) to the host after what is queued; calling the result waits for it."""


class StartBackend(Backend, Protocol):
    """What a start asks besides, which must go on where graphs cannot be had."""

    def probe(self) -> None:
        """Capture a tiny graph with an IF node and replay it; raises ``RuntimeError`` where that does not work."""

    def recover(self) -> None:
        """After a capture that failed: leave the device as if none had been begun; raises if the device is lost."""


class CudaBackend:
    """torch's CUDA graphs, captured on the current stream, which must not be the default one.

    All of them share a memory pool, which is gone with the last of them, and IF bodies a stream: the pool's blocks go
    by stream.

    Args:
        device: a CUDA one.
        pool: enters a capture, given the pool; yields the pool to capture into. vLLM's ``capture_pool``, which tells
            NCCL, and takes memory that sleep mode can free, where that is on.
    """

    def __init__(self, device: torch.device, pool: Callable[[Any], AbstractContextManager[Any]] = nullcontext) -> None:
        self._device = device
        self._pool = self._capturing = torch.cuda.graph_pool_handle()
        self._enter_pool = pool
        self._bodies = torch.cuda.Stream(device)

    @contextmanager
    def capture(self) -> Iterator[Any]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        stream = torch.cuda.current_stream(self._device)
        with self._enter_pool(self._pool) as self._capturing, torch.cuda.graph(graph, self._capturing, stream):
            yield graph

    @contextmanager
    def if_node(self, graph: Any, predicate: torch.Tensor) -> Iterator[None]:
        graph.begin_capture_to_if_node(predicate.view(()))
        try:
            child = torch.cuda.current_stream(self._device)
            self._bodies.wait_stream(child)
            with torch.cuda.stream(self._bodies):
                yield
            child.wait_stream(self._bodies)
        finally:
            graph.end_capture_to_conditional_node()

    def probe(self) -> None:
        flag = torch.zeros(1, dtype=torch.bool, device=self._device)
        ran = torch.zeros(1, device=self._device)
        with self.capture() as graph, self.if_node(graph, flag):
            ran.add_(1)
        found = []
        for wanted in (False, True):
            flag.fill_(wanted)
            graph.replay()
            found.append(float(ran))
        if found != [0.0, 1.0]:
            raise RuntimeError(f"an IF node ran its body {found} times, not [0, 1]")

    def recover(self) -> None:
        # torch's own exit from a capture stops at its first error, before it tells the allocator.
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self._device.index or 0, self._capturing)
        torch.cuda.synchronize(self._device)  # an error that the device does not get over comes up again here

    def replay(self, graph: Any) -> None:
        graph.replay()

    def fetch(self, flag: torch.Tensor) -> Callable[[], bool]:
        copy = HostCopy(flag)

        def wait() -> bool:
            copy.wait()
            return bool(copy.tensor)

        return wait


class DraftGraphs:
    """The captured rounds of an engine.

    Args:
        rounds: what to capture.
        mode: ``if_nodes`` or ``per_pass``.
        sizes: batch sizes to capture.
        max_length: passes of the longest round, K_max.
        backend: CUDA.
    """

    def __init__(self, rounds: Rounds, mode: str, sizes: Sequence[int], max_length: int, backend: Backend) -> None:
        self.mode = mode
        self.sizes = sorted(sizes)
        self._rounds, self._max_length, self._backend = rounds, max_length, backend
        self._graphs: dict[int, list[Any]] = {}  # batch size -> the round, or its passes in order

    def capture(self) -> None:
        """Capture every batch size, the largest first: the others then fit into its memory.

        Each round is run once outside a graph before: kernels are compiled and libraries set up at their first call,
        which a capture would not survive. All of them first: these passes meet other ranks, captures do not, so a rank
        whose capture fails leaves nobody waiting.
        """
        for size in reversed(self.sizes):
            first, later = self._rounds.prepare_capture(size)
            first()
            for step in range(2, self._max_length + 1):
                later(step)
        for size in reversed(self.sizes):
            first, later = self._rounds.prepare_capture(size)
            self._graphs[size] = self._capture_round(first, later)

    @property
    def num_graphs(self) -> int:
        """Captured graphs, of all sizes."""
        return sum(map(len, self._graphs.values()))

    def _capture_round(self, first: Callable[[], None], later: Callable[[int], None]) -> list[Any]:
        """The graph of the first pass, then those of the later ones."""
        with self._backend.capture() as graph:
            first()
        graphs = [graph]
        steps = range(2, self._max_length + 1)
        if self.mode == IF_NODES and steps:
            with self._backend.capture() as graph:
                for step in steps:
                    with self._backend.if_node(graph, self._rounds.any_running):
                        later(step)
            return [*graphs, graph]
        for step in steps:
            with self._backend.capture() as graph:
                later(step)
            graphs.append(graph)
        return graphs

    def size_for(self, num_reqs: int) -> int | None:
        """The batch size whose graphs serve ``num_reqs`` requests; None if there is none."""
        return next((size for size in self.sizes if size >= num_reqs and size in self._graphs), None)

    def replay(self, size: int, max_length: int, *, first: bool = True) -> int | None:
        """Run a round of at most ``max_length`` candidates; what the passes read is in their buffers already.

        Args:
            size: of :meth:`size_for`.
            max_length: of the longest draft that may come of it.
            first: whether to run the first pass; else it has just been run outside the graphs.

        Returns:
            How many passes were queued, the first one counted in any case; None if only the device knows.
        """
        graphs, fetch = self._graphs[size], self._backend.fetch
        if first:
            self._backend.replay(graphs[0])
        if max_length < 2 or len(graphs) == 1:
            return 1
        if self.mode == IF_NODES:
            self._backend.replay(graphs[1])
            return None
        flags = [fetch(self._rounds.any_running)]  # after each queued pass: whether it left somebody running
        for index, graph in enumerate(graphs[1:max_length], 1):
            # One pass late: of the last one queued nothing is known yet.
            if index >= 2 and not flags[index - 2]():
                return index
            self._backend.replay(graph)
            flags.append(fetch(self._rounds.any_running))
        return len(flags)
