# SPDX-License-Identifier: Apache-2.0
"""What is chosen on a GPU where the user chose nothing, and that the user's choice wins."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_specdecpp.config import SpecDecPPConfig
from vllm_specdecpp.engine import gpu_defaults

GIB = 2**30


@pytest.fixture
def gpu(monkeypatch) -> Callable[..., None]:
    """Pretend to be a GPU of some compute capability and memory."""
    import vllm.platforms

    def make(major: int = 9, memory: int = 80 * GIB) -> None:
        capability = SimpleNamespace(major=major, minor=0)
        monkeypatch.setattr(
            vllm.platforms, "current_platform",
            SimpleNamespace(
                is_cuda=lambda: True, get_device_total_memory=lambda: memory, get_device_capability=lambda: capability
            ),
        )  # fmt: skip

    return make


def _args(**given: Any) -> Any:
    model = SimpleNamespace(
        get_vocab_size=lambda: 128_256, head_dtype=torch.bfloat16, use_mla=given.pop("use_mla", False),
        is_hybrid=given.pop("is_hybrid", False), attention_chunk_size=given.pop("attention_chunk_size", None),
    )  # fmt: skip
    return SimpleNamespace(**{
        "model": "org/target", "max_num_seqs": None, "max_num_batched_tokens": None, "gpu_memory_utilization": 0.9,
        "pipeline_parallel_size": 1, "tensor_parallel_size": 1, "enable_lora": False, "attention_backend": None,
        "attention_config": SimpleNamespace(backend=None, flash_attn_version=None), "async_scheduling": None,
        "speculative_config": {}, "create_model_config": lambda: model,
        "get_batch_defaults": lambda world: ({"a": 8192, "b": 2048}, {"a": 256, "b": 128}), **given,
    })  # fmt: skip


def _config(**ours: Any) -> SpecDecPPConfig:
    return SpecDecPPConfig(model="org/draft", **ours)


@pytest.mark.parametrize(
    ("given", "user", "memory", "length"),
    [
        ({}, {}, 80, 10),
        ({}, {}, 24, 10),
        ({"max_num_seqs": 1024}, {}, 80, 10),
        ({}, {"draft_sample_method": "probabilistic"}, 16, 5),
        ({"max_num_seqs": 1024}, {"draft_sample_method": "probabilistic"}, 40, 4),
        ({"max_num_seqs": 4}, {"draft_sample_method": "probabilistic"}, 8, 10),
        ({}, {}, 1, 1),
        ({}, {"min_speculative_tokens": 12}, 80, 12),
    ],
)
def test_the_default_length_fits_into_memory(gpu, given, user, memory, length):
    gpu(memory=memory * GIB)
    assert gpu_defaults.default_length(_args(**given), user) == length


def _schedule(config: SpecDecPPConfig | None = None, *, may_run_v2: bool = True, **given: Any) -> tuple[Any, Any]:
    args = _args(**given)
    scheduling = gpu_defaults.Scheduling(args, config or _config(), may_run_v2=may_run_v2)
    return args, scheduling


def _chosen(args: Any) -> tuple[Any, Any]:
    return args.async_scheduling, args.speculative_config.get("enable_adaptive_verification")


@pytest.mark.parametrize(
    ("config", "given", "chosen"),
    [
        ({}, {}, (True, True)),
        ({"rule": "confidence"}, {}, (True, True)),
        ({"rule": "fixed"}, {}, (True, None)),
        ({}, {"enable_lora": True}, (False, None)),
        ({}, {"use_mla": True}, (False, None)),
        ({}, {"is_hybrid": True, "attention_backend": "TRITON_ATTN"}, (False, None)),
        ({}, {"attention_chunk_size": 8192}, (False, None)),
        ({}, {"speculative_config": {"draft_sample_method": "probabilistic"}}, (False, None)),
        ({}, {"attention_backend": "FLASHINFER"}, (False, None)),
        ({}, {"attention_config": SimpleNamespace(backend=None, flash_attn_version=2)}, (False, None)),
        ({}, {"attention_config": SimpleNamespace(backend=SimpleNamespace(name="FLASH_ATTN"), flash_attn_version=3)},
         (True, True)),
    ],
)  # fmt: skip
def test_defaults_follow_the_options(gpu, config, given, chosen):
    gpu()
    args, _ = _schedule(_config(**config), **given)
    assert _chosen(args) == chosen


@pytest.mark.parametrize(
    ("major", "backend", "chosen"),
    [(8, None, (False, None)), (9, None, (True, True)), (10, None, (False, None)), (8, "triton_attn", (True, True))],
)
def test_defaults_follow_the_attention_backend(gpu, major, backend, chosen):
    gpu(major=major)
    args, scheduling = _schedule(attention_backend=backend)
    assert _chosen(args) == chosen
    assert bool(scheduling.reason) is (not chosen[0])


@pytest.mark.parametrize(
    ("given", "chosen", "left"),
    [
        ({"async_scheduling": False}, (False, None), (False, None)),
        ({"async_scheduling": True}, (True, True), (True, None)),
        ({"async_scheduling": True, "enable_lora": True}, (True, None), (True, None)),
        ({"speculative_config": {"enable_adaptive_verification": False}}, (False, False), (False, False)),
        ({"speculative_config": {"enable_adaptive_verification": True}}, (True, True), (False, True)),
        (
            {"speculative_config": {"enable_adaptive_verification": True}, "async_scheduling": False},
            (False, True),
            (False, True),
        ),
    ],
)
def test_what_the_user_gives_wins(gpu, given, chosen, left):
    gpu()
    args, scheduling = _schedule(**given)
    assert _chosen(args) == chosen
    scheduling.take_back("vLLM refuses it")
    assert _chosen(args) == left


def test_defaults_are_taken_back_once(gpu):
    gpu()
    args, scheduling = _schedule()
    assert scheduling.take_back("vLLM chose Model Runner V1")
    assert _chosen(args) == (False, None)
    assert not scheduling.take_back("again")


def test_nothing_is_chosen_elsewhere(gpu):
    args, scheduling = _schedule()  # a CPU
    assert _chosen(args) == (False, None) and not scheduling.take_back("nothing to take")
    gpu()
    args, _ = _schedule(may_run_v2=False)
    assert _chosen(args) == (False, None)


def _vllm_config(**settings: Any) -> Any:
    draft = SimpleNamespace(draft_model_config=None)
    return SimpleNamespace(model_config=None, speculative_config=draft, **settings)


def _engine_args(monkeypatch: Any, original: Callable[[Any], Any]) -> Any:
    """The wrapped ``create_engine_config`` around ``original``, with the rest of the front end left out."""
    from vllm_specdecpp.engine import options

    monkeypatch.setattr(options, "expand", lambda args: _config())
    monkeypatch.setattr(options, "_may_run_v2", lambda config: True)
    for name in ("_check_model_runner", "_check_data_parallel", "_check_head"):
        monkeypatch.setattr(options, name, lambda *_: None)
    monkeypatch.setattr(options, "schedule_one_row", lambda _: None)
    monkeypatch.setattr(options.draft_layers, "keep_alike", lambda _: None)
    for name in ("check_requests", "show_metrics"):
        monkeypatch.setattr(options.front_end, name, lambda: None)
    monkeypatch.setattr(gpu_defaults, "check_memory", lambda *_: None)
    return options._wrap_create_engine_config(original)


def test_vllm_decides_in_the_end(gpu, monkeypatch, caplog):
    """Where it chooses Model Runner V1, or refuses the defaults, it is asked again without them."""
    from pydantic import TypeAdapter

    gpu()
    asked = []

    def on_v1(args: Any) -> Any:
        asked.append(_chosen(args))
        return _vllm_config(use_v2_model_runner=False)

    _engine_args(monkeypatch, on_v1)(_args())
    assert asked == [(True, True), (False, None)]

    def refuses(args: Any) -> Any:
        asked.append(_chosen(args))
        if args.async_scheduling:
            TypeAdapter(int).validate_python("no number")
        return _vllm_config(use_v2_model_runner=True)

    asked.clear()
    with caplog.at_level("INFO"):
        _engine_args(monkeypatch, refuses)(_args())
    assert asked == [(True, True), (False, None)]
    assert "scheduling is synchronous" in caplog.text and "valid integer" in caplog.text

    def refuses_all(args: Any) -> Any:
        TypeAdapter(int).validate_python("no number")

    with pytest.raises(ValueError, match="^specdecpp: model='org/draft'"):
        _engine_args(monkeypatch, refuses_all)(_args())


@pytest.mark.asks(16)
def test_memory_that_is_not_there_is_refused_at_start_up(gpu):
    gpu(memory=8 * GIB)
    model = SimpleNamespace(get_vocab_size=lambda: 128_256, head_dtype=torch.bfloat16)
    vllm_config = SimpleNamespace(
        use_v2_model_runner=True, model_config=model,
        scheduler_config=SimpleNamespace(max_num_seqs=1024, max_num_batched_tokens=8192),
        parallel_config=SimpleNamespace(tensor_parallel_size=2),
        speculative_config=SimpleNamespace(
            num_speculative_tokens=20, draft_sample_method="probabilistic", num_speculative_tokens_per_batch_size=None
        ),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"^specdecpp: num_speculative_tokens=20 with max_num_seqs=1024"):
        gpu_defaults.check_memory(_args(), vllm_config)
    gpu(memory=80 * GIB)
    gpu_defaults.check_memory(_args(), vllm_config)
