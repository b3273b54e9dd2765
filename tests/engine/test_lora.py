# SPDX-License-Identifier: Apache-2.0
"""A LoRA adapter on the target: the draft model has none, and the output is the adapted target's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests import engine_harness as harness
from tests.tiny_models import HIDDEN_SIZE

pytest.importorskip("vllm")

PROMPTS = harness.prompts(6, seed=11)
OPTIONS: dict[str, Any] = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 1}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """A random adapter of rank 8 in PEFT's format, on the attention's query and value projections."""
    folder: Path = tmp_path_factory.mktemp("adapter")
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for layer in range(2):
        for name in ("q_proj", "v_proj"):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = 0.17 * torch.randn(8, HIDDEN_SIZE, generator=generator)
            tensors[f"{prefix}.lora_B.weight"] = 0.17 * torch.randn(HIDDEN_SIZE, 8, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _answers(llm: Any, adapter: Path) -> list[list[int]]:
    """All with the adapter: vLLM's CPU kernels let it touch requests without one in the same batch."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    lora = LoRARequest("tiny", 1, str(adapter))
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": p} for p in PROMPTS]
    return harness.token_ids(llm.generate(prompts, params, lora_request=lora, use_tqdm=False))


def test_the_output_is_the_adapted_targets(tiny, adapter):
    with harness.engine(tiny.target, **OPTIONS) as llm:
        expected = _answers(llm, adapter)
        plain = harness.token_ids(harness.generate(llm, PROMPTS, max_tokens=24, ignore_eos=True))
    assert all(a != b for a, b in zip(expected, plain, strict=True))
    config = {"method": "specdecpp", "model": tiny.draft_good, "num_speculative_tokens": 4}
    with harness.engine(tiny.target, config, **OPTIONS) as llm:  # cost_aware: its start times both models
        harness.forget(harness.set_costs(llm, harness.CHEAP))
        for rule in ("cost_aware", "confidence"):
            harness.configure(llm, rule=rule)
            assert _answers(llm, adapter) == expected, rule
            assert llm.collective_rpc("specdecpp_stats", kwargs={"reset": True})[0]["accepted"] > 10, rule
