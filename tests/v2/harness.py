# SPDX-License-Identifier: Apache-2.0
"""Builds a V2 speculator without an engine around it."""

from __future__ import annotations

import functools
import types
from typing import Any
from unittest import mock

import torch

from tests import engine_harness
from tests.v2 import oracle
from vllm_specdecpp.decision import tails


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
    tiny: Any, *, draft_sample_method: str = "greedy", num_speculative_tokens: int = 6, kernels: bool = False,
    **options: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """vLLM's configuration and a speculator over the oracle, its rule in force.

    It scores and decides by the kernels, or by their twins in torch, which are quicker than interpreted kernels.
    """
    from vllm.config import set_current_vllm_config

    from vllm_specdecpp.config import SpecDecPPConfig
    from vllm_specdecpp.engine.v2.speculator import SpecDecPPSpeculator

    sampling = (("draft_sample_method", draft_sample_method),)
    vllm_config = _vllm_config(tiny.target, tiny.draft_good, num_speculative_tokens, sampling)
    config = SpecDecPPConfig(model=tiny.draft_good, num_speculative_tokens=num_speculative_tokens, **options)
    with set_current_vllm_config(vllm_config):
        made = SpecDecPPSpeculator(vllm_config, torch.device("cpu"), config)
    oracle.attach(made)
    if not kernels:
        made.round._threshold_tail = tails.threshold_tail
        made.round._features = _by_twin(made.round._features)  # type: ignore[method-assign]
    made.set_rule(config)
    return vllm_config, made


def capturable(speculator: Any) -> None:
    """Let its rounds be captured, metadata and all, without a runner around it."""
    speculator.model_state = _model_state()
    for groups in speculator.attn_groups:
        for group in groups:
            group.update_draft_decode_metadata = lambda metadata: None


def _model_state() -> Any:
    """Makes attention metadata from a dummy batch, as a runner's model state does."""
    from vllm.v1.worker.gpu.attn_utils import build_attn_metadata

    def prepare_attn(
        batch: Any, mode: Any, tables: Any, slots: Any, groups: Any, config: Any, for_capture: bool
    ) -> Any:

        assert for_capture
        return build_attn_metadata(
            attn_groups=groups, num_reqs=batch.num_reqs, num_tokens=batch.num_tokens,
            query_start_loc_gpu=batch.query_start_loc, query_start_loc_cpu=torch.from_numpy(batch.query_start_loc_np),
            max_query_len=batch.num_tokens // batch.num_reqs, seq_lens=batch.seq_lens, max_seq_len=256,
            block_tables=tables, slot_mappings=slots, kv_cache_config=config,
        )  # fmt: skip

    return types.SimpleNamespace(prepare_attn=prepare_attn)


def _by_twin(features: Any) -> Any:
    from vllm_specdecpp.engine.v2 import round as device_round
    from vllm_specdecpp.kernels.logits_summary import logits_summary_torch

    def by_twin(*args: Any) -> Any:
        with mock.patch.object(device_round, "logits_summary", logits_summary_torch):
            return features(*args)

    return by_twin


def speculator_of(llm: Any) -> Any:
    """A running engine's."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.speculator


def fix_costs(llm: Any, curves: dict[str, dict[int, float]]) -> Any:
    """Give an engine's cost-aware rule these costs for good: real times teach it nothing. Returns its host side."""
    cost_aware = speculator_of(llm).cost_aware
    engine_harness.fix_costs(cost_aware, curves)
    return cost_aware
