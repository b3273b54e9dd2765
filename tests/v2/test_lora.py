# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters on the target on Model Runner V2: the output is each request's adapted target's.

Requests with one adapter, with another that changes the lm_head as well, and with none share batches. vLLM's CPU
kernels let a request without an adapter use the last slot, which is therefore left empty.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests import engine_harness as harness
from tests.tiny_models import HIDDEN_SIZE, VOCAB_SIZE
from tests.v2 import harness as v2_harness
from vllm_specdecpp.costs import timing
from vllm_specdecpp.engine.v2 import lora as v2_lora

MAX_TOKENS, RANK = 12, 8
PROMPTS = harness.prompts(6, seed=11)
OPTIONS: dict[str, Any] = {"enable_lora": True, "max_lora_rank": RANK, "max_loras": 3}
CHEAP = {"first": {1: 1e-3}, "step": {1: 1e-3}, "verify": {1: 20e-3, 64: 22e-3}}
"""Seconds: drafting is well worth it."""


def _save_adapter(folder: Path, seed: int, lm_head: bool) -> None:
    """A random adapter in PEFT's format, on the attention's query and value projections, and on the lm_head."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {f"model.layers.{i}.self_attn.{name}": HIDDEN_SIZE for i in range(2) for name in ("q_proj", "v_proj")}
    if lm_head:
        sizes["lm_head"] = VOCAB_SIZE
    tensors = {}
    for name, size in sizes.items():
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = 0.1 * torch.randn(RANK, HIDDEN_SIZE, generator=generator)
        tensors[f"{prefix}.lora_B.weight"] = 0.1 * torch.randn(size, RANK, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "lora_dropout": 0.0,
        "bias": "none", "target_modules": ["q_proj", "v_proj", *(["lm_head"] if lm_head else [])],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> list[Any]:
    """None, an adapter of the attention, one of the attention and the lm_head."""
    from vllm.lora.request import LoRARequest

    folder = tmp_path_factory.mktemp("adapters")
    requests = []
    for number, lm_head in enumerate([False, True], 1):
        _save_adapter(folder / str(number), number, lm_head)
        requests.append(LoRARequest(f"adapter {number}", number, str(folder / str(number))))
    return [None, *requests]


def _answers(llm: Any, prompts: list[list[int]], adapters: list[Any]) -> list[list[int]]:
    """Each prompt's, with the next adapter."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True, detokenize=False)
    loras = [adapters[i % len(adapters)] for i in range(len(prompts))]
    requests = [{"prompt_token_ids": p} for p in prompts]
    return harness.token_ids(llm.generate(requests, params, lora_request=loras, use_tqdm=False))


@pytest.fixture(scope="module")
def expected(tiny, adapters):
    """With speculation off, on the same runner."""
    with harness.engine(tiny.target, **OPTIONS) as llm:
        mixed = _answers(llm, PROMPTS, adapters)
        bare = _answers(llm, PROMPTS, [None])
    assert [a == b for a, b in zip(mixed, bare, strict=True)] == [True, False, False] * 2
    return mixed


@pytest.fixture(scope="module")
def started(tiny, expected, tmp_path_factory):
    """An engine with the default rule, and what was seen of its start; only one engine can live at a time."""
    seen: dict[str, Any] = {"dummies": Counter(), "mappings": []}
    config = {
        "method": "specdecpp", "model": tiny.draft_good, "sources": ["draft_model"], "num_speculative_tokens": 4,
        "trace_rounds": 10_000,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        from vllm.lora.worker_manager import WorkerLoRAManager

        from vllm_specdecpp.engine.v2.timing import V2Passes

        add, target = WorkerLoRAManager.add_dummy_lora, V2Passes.target

        def watched(self: Any, num_rows: int) -> None:
            target(self, num_rows)
            lora = self._speculator.runner.lora_manager._adapter_manager.punica_wrapper_mapping
            wrapper = next(iter(lora.values()))
            seen["mappings"].append((num_rows, wrapper.token_lora_indices.tolist(), wrapper.sampler_indices.tolist()))

        def counted(self: Any, request: Any, rank: int) -> bool:
            seen["dummies"][request.lora_int_id] += bool(seen["mappings"])
            return add(self, request, rank)

        patch.setenv("VLLM_CACHE_ROOT", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(timing, "MOST", 0.3)
        patch.setattr(WorkerLoRAManager, "add_dummy_lora", counted)
        patch.setattr(V2Passes, "target", watched)
        with harness.engine(tiny.target, config, **OPTIONS) as llm:
            yield llm, seen


def _runner(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def test_the_start_times_the_target_with_an_adapter(started):
    """Made once, not in each run that is timed; on every row of the pass, and of the logits."""
    llm, seen = started
    runner = _runner(llm)
    assert len({num_rows for num_rows, *_ in seen["mappings"]}) >= 4
    for num_rows, tokens, rows in seen["mappings"]:
        assert tokens == [0] * num_rows and rows == [0] * num_rows
    assert sum(seen["dummies"].values()) == 0
    assert runner.lora_manager.list_adapters() == set()
    assert "maybe_dummy_run_with_lora" not in vars(runner)
    cost_aware = runner.speculator.cost_aware
    assert all(min(curve.values()) > 0 for curve in cost_aware.rule.costs.points().values())
    assert cost_aware.file.setting["lora"] == "3 of rank 8"


@pytest.mark.parametrize("rule", ["cost_aware", "confidence"])
def test_the_output_is_the_adapted_targets(started, adapters, expected, rule):
    llm, _ = started
    harness.configure(llm, rule=rule, **({"threshold": 0.8} if rule == "confidence" else {}))
    if rule == "cost_aware":
        v2_harness.fix_costs(llm, CHEAP)
    harness.take_rounds(llm)
    assert _answers(llm, PROMPTS, adapters) == expected
    rounds = harness.take_rounds(llm)
    assert len({len(r["candidates"]) for r in rounds}) >= 3
    accepted = Counter({0: 0, 1: 0, 2: 0})
    for r in rounds:  # ids count up, three or six requests at a time
        accepted[int(r["request_id"].split("-")[0]) % 3] += r["accepted"]
    assert min(accepted.values()) >= 2, accepted  # of each kind of request


def test_timing_between_requests_leaves_the_adapters_right(started, adapters, expected):
    """Another rule, then the default one for the first time: both models are timed in a running engine."""
    llm, seen = started
    speculator = _runner(llm).speculator
    harness.configure(llm, rule="confidence", threshold=0.8)
    assert _answers(llm, PROMPTS[:3], adapters) == expected[:3]
    speculator.cost_aware.file.path.unlink(missing_ok=True)
    speculator.cost_aware, timed = None, len(seen["mappings"])
    harness.configure(llm, rule="cost_aware")
    assert len(seen["mappings"]) > timed
    assert _answers(llm, PROMPTS, adapters) == expected


def test_rows_of_logits_have_their_requests_adapter():
    import types

    from vllm.v1.worker.gpu.lora_utils import LoraState

    state = LoraState(4)
    state.lora_ids[:] = [0, 7, 0, 9]
    batch = types.SimpleNamespace(num_reqs=3, cu_num_logits_np=np.array([0, 3, 4, 6, 99]))
    runner = types.SimpleNamespace(lora_state=state, prepare_inputs=lambda: batch)
    v2_lora.count_rows(runner)
    v2_lora.count_rows(runner)
    state, slots, tokens = runner.lora_state, np.array([3, 0, 1]), np.array([3, 2, 5])
    assert state.make_lora_inputs([], slots, tokens)[0] == (9, 0, 7)  # nothing is prepared yet
    assert runner.prepare_inputs() is batch
    rows, mapped, requests = state.make_lora_inputs([], slots, tokens)
    assert rows == (9, 9, 9, 0, 7, 7) and mapped == (9,) * 3 + (0,) * 2 + (7,) * 5 and requests == set()
