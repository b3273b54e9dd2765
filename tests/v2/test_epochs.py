# SPDX-License-Identifier: Apache-2.0
"""Captured rounds live as long as their KV cache: vLLM's own start on a GPU, on a CPU with graphs that only check.

Driven are vLLM's ``profile_cudagraph_memory``, ``warmup_kernels`` and ``capture_model``, in the Worker's order.
"""

from __future__ import annotations

import contextlib
import gc
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests import engine_harness as harness
from tests.v2.epochs import DeadGraph, EpochBackend, EpochGraph, Epochs, Pool
from vllm_specdecpp.engine.v2 import capture, graphs

K, MAX_NUM_SEQS = 2, 2
PROMPTS = harness.prompts(3, seed=5)


@contextlib.contextmanager
def _gpu_start(epochs: Epochs, backends: list[EpochBackend]) -> Iterator[None]:
    """Let vLLM's CPU Worker start as its GPU Worker does, with graphs of ``epochs`` in the place of CUDA's."""
    from vllm.config.compilation import CUDAGraphMode
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder
    from vllm.v1.worker.cpu.model_runner import CPUModelRunner
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu import cudagraph_utils, model_runner
    from vllm.v1.worker.gpu.warmup import warmup_kernels

    targets_pool = Pool()
    determine, warm_up = CPUWorker.determine_available_memory, CPUWorker.compile_or_warm_up_model
    initialize, teardown = CPUModelRunner.initialize_kv_cache, cudagraph_utils._teardown_profiling_state

    class TargetGraph(EpochGraph):
        def __init__(self) -> None:
            super().__init__(epochs, "target", targets_pool)

    def determine_available_memory(self: Any) -> int:
        available = determine(self)
        self.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
        self.compilation_config.cudagraph_capture_sizes = [1, 3]
        self.compilation_config.max_cudagraph_capture_size = 3
        self.model_runner.profile_cudagraph_memory()
        return int(available)

    def initialize_kv_cache(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        epochs.begin()
        self.config_given = config
        initialize(self, config, *args, **kwargs)

    def compile_or_warm_up_model(self: Any) -> Any:
        times = warm_up(self)
        warmup_kernels(self.model_runner, self.execute_model, self.sample_tokens)
        self.model_runner.capture_model()
        return times

    def torn_down(runner: Any) -> None:
        epochs.end()
        teardown(runner)

    def new_backend(self: Any) -> EpochBackend:
        backends.append(EpochBackend(epochs))
        return backends[-1]

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "determine_available_memory": determine_available_memory,
            "compile_or_warm_up_model": compile_or_warm_up_model,
        }.items():
            patch.setattr(CPUWorker, name, value)
        patch.setattr(CPUModelRunner, "initialize_kv_cache", initialize_kv_cache)
        patch.setattr(CPUAttentionMetadataBuilder, "_cudagraph_support", AttentionCGSupport.ALWAYS)
        patch.setattr(CpuPlatform, "graph_pool_handle", lambda self: object(), raising=False)
        patch.setattr(cudagraph_utils, "_teardown_profiling_state", torn_down)
        patch.setattr(cudagraph_utils, "graph_capture", lambda device: contextlib.nullcontext())
        patch.setattr(cudagraph_utils, "capture_pool", lambda *_: contextlib.nullcontext())
        patch.setattr(model_runner, "lock_workspace", lambda: None)
        patch.setattr(cudagraph_utils, "gc", types.SimpleNamespace(collect=lambda: 0))  # takes seconds here
        patch.setattr(torch.cuda, "CUDAGraph", TargetGraph)
        patch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
        patch.setattr(capture, "graph_capture", lambda device: contextlib.nullcontext())
        patch.setattr(capture.CapturedRounds, "_backend", new_backend)
        patch.setattr(capture.CapturedRounds, "_update_draft_decode_metadata", lambda *_: None)  # CPU's cannot
        patch.setattr(graphs, "choose_mode", lambda **_: (graphs.PER_PASS, "asked for by the test"))
        yield


@pytest.fixture(scope="module")
def started(tiny) -> Iterator[Any]:
    """An engine that has been through the whole start, its epochs, and its backends."""
    epochs, backends = Epochs(), list[EpochBackend]()
    config = {
        "method": "specdecpp", "model": tiny.draft_good, "rule": "confidence", "threshold": 0.9,
        "num_speculative_tokens": K,
    }  # fmt: skip
    with (
        _gpu_start(epochs, backends),
        harness.engine(
            tiny.target, config, max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=64, enable_prefix_caching=True
        ) as llm,
    ):
        worker = llm.llm_engine.model_executor.driver_worker.worker
        yield types.SimpleNamespace(
            llm=llm, worker=worker, runner=worker.model_runner, speculator=worker.model_runner.speculator,
            epochs=epochs, backends=backends,
        )  # fmt: skip


def _start_again(started: Any, *, warms: bool = False) -> None:
    """The same order once more, as when the KV cache is made anew; with vLLM's warm-up if wanted, which takes long."""
    from vllm.v1.core.sched.output import SchedulerOutput

    runner, nobody = started.runner, SchedulerOutput.make_empty()
    nobody.finished_req_ids = set(runner.req_states.req_id_to_index)
    started.worker.execute_model(nobody)
    config = runner.config_given
    runner.profile_cudagraph_memory()
    runner.initialize_kv_cache(config)
    if warms:
        started.worker.compile_or_warm_up_model()
    else:
        runner.capture_model()


def _serves(started: Any) -> int:
    """Generate; gives how many draft graphs were replayed, all of them of the KV cache in force."""
    before = len(started.epochs.replayed)
    outputs = harness.generate(started.llm, PROMPTS, max_tokens=6, ignore_eos=True)
    assert [len(tokens) for tokens in harness.token_ids(outputs)] == [6] * len(PROMPTS)
    new = started.epochs.replayed[before:]
    assert {epoch for _, epoch in new} <= {started.epochs.now}
    return sum(kind == "draft" for kind, _ in new)


def _live_pools(epochs: Epochs) -> int:
    gc.collect()
    return len(epochs.pools)


def test_epoch_of_every_replay_is_the_one_in_force(started):
    assert started.epochs.now == 2 and len(started.backends) == 2  # the first KV cache only measures memory
    assert started.backends[0].num_captures == started.backends[1].num_captures == 2 * K  # of batches of 1 and 2
    stats = started.worker.specdecpp_stats()
    assert stats["rounds"] == stats["draft_passes"] == 0  # the warm-up's are nobody's
    started.backends.clear()
    assert _live_pools(started.epochs) == 1
    assert _serves(started) > 0


def test_epoch_goes_on_through_sleep_and_a_reset_of_the_prefix_cache(started):
    graphs_before = started.speculator.graphs
    started.worker.sleep(1)
    started.worker.wake_up()
    assert started.llm.reset_prefix_cache()
    assert started.speculator.graphs is graphs_before
    assert _serves(started) > 0


def test_epoch_ends_with_its_kv_cache(started):
    epoch, pool = started.epochs.now, started.speculator.graphs._backend.pool
    started.runner.initialize_kv_cache(started.runner.config_given)
    assert started.speculator.graphs is None and started.epochs.now == epoch + 1
    assert "new KV cache" in started.speculator.how_rounds_run()[1]
    assert _serves(started) == 0  # eagerly, until the next capture
    started.runner.capture_model()
    del pool
    started.backends.clear()
    assert _live_pools(started.epochs) == 1 and _serves(started) > 0


def test_epoch_bug_of_a_pool_that_stays_is_noticed(started):
    """The test's power: what would keep the last epoch's memory shows in the count."""
    kept = started.speculator.graphs
    _start_again(started)
    started.backends.clear()
    assert kept is not started.speculator.graphs and _live_pools(started.epochs) == 2


def test_epoch_of_a_start_that_fails_to_capture_leaves_no_graph(started, monkeypatch):
    """The first capture, while memory is measured, succeeds; the real one does not."""
    made: list[EpochBackend] = []

    def backend(self: Any) -> EpochBackend:
        made.append(EpochBackend(started.epochs, fail_at=None if not made else 3))
        return made[-1]

    monkeypatch.setattr(capture.CapturedRounds, "_backend", backend)
    _start_again(started)
    assert [b.num_recovered for b in made] == [0, 1]
    assert started.speculator.graphs is None
    mode, reason = started.speculator.how_rounds_run()
    assert mode == graphs.EAGER and "operation failed due to a previous error" in reason
    made.clear()
    started.backends.clear()
    assert _live_pools(started.epochs) == 0 and _serves(started) == 0
    monkeypatch.undo()


def _sleeper(head: torch.nn.Module) -> Any:
    """A Worker whose vLLM part discards all weights when it sleeps deeply."""
    from vllm_specdecpp.engine.install import SpecDecPPWorkerMixin

    class Vllms:
        def sleep(self, level: int) -> None:
            for tensor in (*head.parameters(), *head.buffers()) if level == 2 else ():
                tensor.data.zero_()

        def wake_up(self, tags: list[str] | None) -> None:
            pass

    class Worker(SpecDecPPWorkerMixin, Vllms):
        vllm_config = types.SimpleNamespace(use_v2_model_runner=True)
        model_runner = types.SimpleNamespace(speculator=types.SimpleNamespace(head=head))

    return Worker()


def test_epoch_ends_with_the_engine():
    """NCCL waits for the graphs that use a communicator: they are gone when vLLM's part of the shutdown begins."""
    from vllm_specdecpp.engine.install import SpecDecPPWorkerMixin

    alive: list[int] = []

    class Vllms:
        def shutdown(self) -> None:
            alive.append(_live_pools(epochs))

    class Worker(SpecDecPPWorkerMixin, Vllms):
        pass

    def save() -> None:
        alive.append(_live_pools(epochs))

    epochs, worker = Epochs(), Worker()
    speculator: Any = types.SimpleNamespace(cost_aware=types.SimpleNamespace(save=save), _mode=None)
    speculator.drop_graphs = types.MethodType(capture.CapturedRounds.drop_graphs, speculator)
    speculator.graphs = graphs.DraftGraphs(speculator, graphs.PER_PASS, [1], K, EpochBackend(epochs))
    worker.model_runner = types.SimpleNamespace(drafter=None, speculator=speculator)
    worker.shutdown()
    assert alive == [1, 0]


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.asks(17)
def test_epoch_of_a_head_goes_on_through_sleep(level):
    head: Any = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    before = {name: tensor.clone() for name, tensor in head.state_dict().items() if tensor.is_floating_point()}
    places = [tensor.data_ptr() for tensor in head.parameters()]
    worker = _sleeper(head)
    worker.sleep(level)
    worker.wake_up(["kv_cache"])
    assert (level == 1) == bool(head[0].weight.any())  # the weights are not back yet
    worker.wake_up(["weights"])
    for name, tensor in before.items():
        assert torch.equal(head.state_dict()[name], tensor)
    assert [tensor.data_ptr() for tensor in head.parameters()] == places  # a graph holds them


def _keeps(monkeypatch: Any) -> None:
    """Graphs stay when the KV cache goes."""
    monkeypatch.setattr(capture.CapturedRounds, "drop_graphs", lambda self, reason: None)


def _drops_too_late(monkeypatch: Any) -> None:
    """Graphs are dropped by the next capture only: the review's first line."""
    drop = capture.CapturedRounds.drop_graphs

    def late(self: Any, reason: str) -> None:
        if "captured no graphs" in reason:
            drop(self, reason)

    monkeypatch.setattr(capture.CapturedRounds, "drop_graphs", late)


@pytest.mark.parametrize("bug", [_keeps, _drops_too_late])
def test_epoch_bugs_are_noticed(started, monkeypatch, bug):
    with monkeypatch.context() as patch:
        bug(patch)
        with pytest.raises(DeadGraph):
            _start_again(started, warms=True)
    started.speculator.graphs = None
