# SPDX-License-Identifier: Apache-2.0
"""Which CUDA graph vLLM's own dispatcher gives a verification: full ones for K = 0, and for rounds of every length."""

from __future__ import annotations

import random
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

K, MOST_REQS, MOST_TOKENS = 10, 256, 512
RANDOM = random.Random(5)
# A verification of a real round has 1 to K + 1 tokens of each request.
RAGGED = [[RANDOM.randint(1, K + 1) for _ in range(n)] for n in (1, 2, 3, 7, 8, 15, 24, 32) for _ in range(3)]


def _capture_sizes(query_len: int) -> list[int]:
    """vLLM's default (``VllmConfig._set_cudagraph_sizes``)."""
    sizes = {1, 2, 4, *range(8, 256, 8), *range(256, MOST_TOKENS + 1, 16)}
    if query_len > 1:
        sizes |= {n * query_len for n in (1, 2, 4, *range(8, MOST_REQS + 1, 8)) if n * query_len <= MOST_TOKENS}
    return sorted(sizes)


def _config(length: int) -> Any:
    sizes = _capture_sizes(length + 1)
    spec = types.SimpleNamespace(uses_dynamic_speculative_decoding=lambda: False) if length else None
    return types.SimpleNamespace(
        scheduler_config=types.SimpleNamespace(max_num_seqs=MOST_REQS),
        compilation_config=types.SimpleNamespace(
            cudagraph_capture_sizes=sizes, max_cudagraph_capture_size=sizes[-1]
        ),
        parallel_config=types.SimpleNamespace(tensor_parallel_size=1, data_parallel_size=1),
        cache_config=types.SimpleNamespace(use_kda_recoverssm=False),
        speculative_config=spec, num_speculative_tokens=length,
    )  # fmt: skip


@pytest.fixture
def graphs(monkeypatch) -> Iterator[Any]:
    """vLLM's module, without a device behind it."""
    from vllm.v1.worker.gpu import cudagraph_utils

    one_stage = types.SimpleNamespace(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: one_stage)
    platform = types.SimpleNamespace(get_global_graph_pool=lambda: (0, 1))
    monkeypatch.setattr(cudagraph_utils, "current_platform", platform)
    monkeypatch.setattr(cudagraph_utils, "is_breakable_cudagraph_enabled", lambda: False)
    yield cudagraph_utils


def _manager(cls: Any, mode: str, *, length: int = K, varlen: bool = False, loras: list[int] | None = None) -> Any:
    from vllm.config.compilation import CUDAGraphMode

    made = cls(
        _config(length), torch.device("cpu"), CUDAGraphMode[mode], length + 1, lora_capture_cases=loras,
        varlen_decode=varlen,
    )  # fmt: skip
    made._graphs_captured = True
    return made


def _ask(manager: Any, lengths: list[int], *, prefill: bool = False, loras: int = 0) -> Any:
    """What the runner would run for a batch of these lengths (``GPUModelRunner.execute_model``)."""
    from vllm.v1.worker.utils import get_uniform_decode_token_count

    num_reqs, num_tokens = len(lengths), sum(lengths)
    uniform = get_uniform_decode_token_count(num_reqs, num_tokens, max(lengths), not prefill)
    longest = None if prefill else max(lengths)
    desc = manager.dispatch(num_reqs, num_tokens, uniform, loras, max_query_len=longest)
    if desc.cg_mode.name == "FULL":  # it is one that is captured, and the batch fits into it
        assert desc in manager._capture_descs[desc.cg_mode]
        assert desc.num_reqs >= num_reqs and desc.num_tokens >= num_tokens
    return desc


def _mode(*args: Any, **options: Any) -> str:
    return str(_ask(*args, **options).cg_mode.name)


@pytest.mark.parametrize("varlen", [True, False])
@pytest.mark.parametrize("mode", ["FULL_AND_PIECEWISE", "FULL_DECODE_ONLY"])
def test_dispatch_of_rounds_without_candidates_is_that_of_no_speculation(graphs, mode, varlen):
    from vllm_specdecpp.engine.v2.verify_graphs import VerifyGraphs

    off = _manager(graphs.ModelCudaGraphManager, mode, length=0)
    ours = _manager(VerifyGraphs, mode, varlen=varlen)
    plain = _manager(graphs.ModelCudaGraphManager, mode)
    for num_reqs in range(1, MOST_REQS + 1):
        want, got = _ask(off, [1] * num_reqs), _ask(ours, [1] * num_reqs)
        assert got.cg_mode.name == "FULL" == want.cg_mode.name
        assert got.uniform_token_count == 1  # the very kernels of no speculation, not those of mixed lengths
        assert got.num_tokens <= want.num_tokens  # some more sizes are captured
        assert _mode(plain, [1] * num_reqs) != "FULL"  # the test's power: vLLM's own does not do it


@pytest.mark.parametrize("varlen", [True, False])
def test_dispatch_of_ragged_rounds(graphs, varlen):
    from vllm_specdecpp.engine.v2.verify_graphs import VerifyGraphs

    ours = _manager(VerifyGraphs, "FULL_AND_PIECEWISE", varlen=varlen)
    for lengths in RAGGED:
        full = varlen or len(set(lengths)) == 1 and (len(lengths) == 1 or lengths[0] in (1, K + 1))
        assert (_mode(ours, lengths) == "FULL") == full, lengths
    for length in range(1, K + 2):  # a single request at every length
        assert _mode(ours, [length]) == "FULL"
    assert _mode(ours, [K + 1] * 32) == "FULL"
    assert _mode(ours, [K + 1] * 60) == "NONE"  # beyond vLLM's largest graph, as without us


@pytest.mark.parametrize("varlen", [True, False])
def test_dispatch_of_prompts_stays_out_of_decode_graphs(graphs, varlen):
    from vllm_specdecpp.engine.v2.verify_graphs import VerifyGraphs

    ours = _manager(VerifyGraphs, "FULL_AND_PIECEWISE", varlen=varlen)
    for lengths in ([1, 9], [30], [K + 1] * 4, [1] * 8):
        assert _mode(ours, lengths, prefill=True) == "PIECEWISE"
    assert _mode(ours, [K + 2]) == "PIECEWISE"


@pytest.mark.parametrize("varlen", [True, False])
def test_dispatch_with_adapters(graphs, varlen):
    from vllm_specdecpp.engine.v2.verify_graphs import VerifyGraphs

    ours = _manager(VerifyGraphs, "FULL_AND_PIECEWISE", varlen=varlen, loras=[0, 2])
    for loras in (0, 1, 2):
        got = _ask(ours, [1] * 5, loras=loras)
        assert got.cg_mode.name == "FULL" and got.num_active_loras == (2 if loras else 0)


@pytest.mark.parametrize(
    ("mode", "extra"), [("FULL_AND_PIECEWISE", True), ("FULL_DECODE_ONLY", True), ("FULL", False), ("PIECEWISE", False)]
)
def test_dispatch_sizes_are_bounded_and_told(graphs, mode, extra):
    from vllm.config.compilation import CUDAGraphMode

    from vllm_specdecpp.engine.v2.verify_graphs import VerifyGraphs

    plain, ours = _manager(graphs.ModelCudaGraphManager, mode), _manager(VerifyGraphs, mode)
    before, after = (m._capture_descs.get(CUDAGraphMode.FULL, []) for m in (plain, ours))
    added = len(after) - len(before)
    ones = [size for size in _capture_sizes(K + 1) if size <= MOST_REQS]
    assert added == (len(ones) + K - 1 if extra else 0)
    assert [d.num_tokens for d in after] == sorted((d.num_tokens for d in after), reverse=True)
    assert len(set(after)) == len(after)
    assert f"{len(after)} full CUDA graphs of up to" in ours.describe() or not after
    if mode == "PIECEWISE":
        assert "cudagraph_mode is PIECEWISE" in ours.describe()


def _runner(manager: Any, support: Any, *, bound: int | None = None) -> Any:
    from vllm.v1.attention.backend import AttentionCGSupport

    def group(name: str, level: Any, length: int | None) -> Any:
        builder = types.SimpleNamespace(
            get_cudagraph_support=lambda *_: level, get_varlen_cudagraph_max_query_len=lambda *_: length
        )
        return types.SimpleNamespace(
            layer_names=[name], kv_cache_spec=None, get_metadata_builder=lambda _: builder, backend=type(name, (), {})
        )

    groups = [[group("target", AttentionCGSupport[support], bound), group("draft", AttentionCGSupport.NEVER, None)]]
    always = types.SimpleNamespace(get_additional_cg_support=lambda: (AttentionCGSupport.ALWAYS, None))
    return types.SimpleNamespace(
        cudagraph_manager=manager, vllm_config=manager.vllm_config, device=manager.device, decode_query_len=K + 1,
        lora_capture_cases=[0], attn_groups=groups, model_state=always, pcp_manager=None, fast_prefill=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("support", "bound", "varlen"),
    [("ALWAYS", None, True), ("UNIFORM_BATCH", None, False), ("UNIFORM_BATCH", K + 1, True),
     ("UNIFORM_BATCH", K, False)],
)  # fmt: skip
def test_dispatch_follows_the_targets_attention_backend(graphs, support, bound, varlen):
    """The draft model's own layers do not matter."""
    from vllm_specdecpp.engine.v2.verify_graphs import VerifyGraphs, widen

    runner = _runner(_manager(graphs.ModelCudaGraphManager, "FULL_AND_PIECEWISE"), support, bound=bound)
    told = widen(runner, runner.cudagraph_manager.cudagraph_mode, {"draft"})
    assert type(runner.cudagraph_manager) is VerifyGraphs
    assert runner.cudagraph_manager.varlen_decode is varlen
    assert ("of any lengths" in told) is varlen


@pytest.mark.parametrize(("name", "word"), [("pcp_manager", "prefill context"), ("fast_prefill", "fast_prefill")])
def test_dispatch_is_left_to_vllm_where_it_needs_its_own(graphs, name, word):
    from vllm_specdecpp.engine.v2.verify_graphs import widen

    manager = _manager(graphs.ModelCudaGraphManager, "FULL_AND_PIECEWISE")
    runner = _runner(manager, "ALWAYS")
    setattr(runner, name, object())
    assert word in widen(runner, manager.cudagraph_mode, {"draft"})
    assert runner.cudagraph_manager is manager


def _no_ones(cls: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(cls, "_lengths", lambda self: list(range(2, self.decode_query_len)))


def _last_in_line(cls: Any, monkeypatch: Any) -> None:
    """Only the largest graph of one token each is there for all."""
    monkeypatch.setattr(cls, "_batch_sizes", lambda self, length: [self.max_num_reqs] if length == 1 else [1])


def _behind(cls: Any, monkeypatch: Any) -> None:
    """vLLM's candidates stay in front: those of mixed lengths take rounds without candidates, too."""
    original = cls._init_candidates

    def changed(self: Any) -> None:
        original(self)
        for found in self._candidates.values():
            found.sort(key=lambda d: d.uniform_token_count is not None)

    monkeypatch.setattr(cls, "_init_candidates", changed)


@pytest.mark.parametrize("bug", [_no_ones, _last_in_line, _behind])
def test_dispatch_bugs_are_noticed(graphs, monkeypatch, bug: Callable[[Any, Any], None]):
    from vllm_specdecpp.engine.v2.verify_graphs import VerifyGraphs

    bug(VerifyGraphs, monkeypatch)
    with pytest.raises(AssertionError):
        test_dispatch_of_rounds_without_candidates_is_that_of_no_speculation(graphs, "FULL_AND_PIECEWISE", True)
