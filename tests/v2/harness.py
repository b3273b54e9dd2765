# SPDX-License-Identifier: Apache-2.0
"""Builds a V2 speculator without an engine around it."""

from __future__ import annotations

import functools
from typing import Any

import torch

from tests import engine_harness
from tests.v2 import oracle


@functools.cache
def _vllm_config(target: str, draft: str, num_speculative_tokens: int, options: tuple[tuple[str, Any], ...]) -> Any:
    import vllm.v1.worker.cpu.shm  # noqa: F401  torch.cuda's streams and events as no-ops, as the CPU worker has them
    from vllm.engine.arg_utils import EngineArgs

    speculative_config: dict[str, Any] = {
        "method": "draft_model", "model": draft, "num_speculative_tokens": num_speculative_tokens
    }  # fmt: skip
    return EngineArgs(
        model=target, skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=256, max_num_seqs=4,
        max_num_batched_tokens=256, block_size=oracle.BLOCK_SIZE, speculative_config=speculative_config | dict(options),
    ).create_engine_config()  # fmt: skip


def speculator(
    tiny: Any, cls: Any = None, *, draft_sample_method: str = "greedy", num_speculative_tokens: int = 6, **options: Any
) -> tuple[Any, Any]:
    """vLLM's configuration and a speculator over the oracle, its rule in force."""
    from vllm.config import set_current_vllm_config

    from vllm_specdecpp.config import SpecDecPPConfig
    from vllm_specdecpp.engine.v2.speculator import SpecDecPPSpeculator

    sampling = (("draft_sample_method", draft_sample_method),)
    vllm_config = _vllm_config(tiny.target, tiny.draft_good, num_speculative_tokens, sampling)
    config = SpecDecPPConfig(model=tiny.draft_good, num_speculative_tokens=num_speculative_tokens, **options)
    with set_current_vllm_config(vllm_config):
        made = (cls or SpecDecPPSpeculator)(vllm_config, torch.device("cpu"), config)
    oracle.attach(made)
    made.set_rule(config)
    return vllm_config, made


def fix_costs(llm: Any, curves: dict[str, dict[int, float]]) -> Any:
    """Give an engine's cost-aware rule these costs for good: real times teach it nothing. Returns its host side."""
    worker = llm.llm_engine.model_executor.driver_worker.worker
    cost_aware = worker.model_runner.speculator.cost_aware
    engine_harness.fix_costs(cost_aware, curves)
    return cost_aware
