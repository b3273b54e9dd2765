# SPDX-License-Identifier: Apache-2.0
"""Draft models in which only some layers have a sliding window, as Gemma 3's, draft like any other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import engine_harness as harness


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """A folder; every other layer sees 32 tokens."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    folder = tmp_path_factory.mktemp("gemma")
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, sliding_window=32, query_pre_attn_scalar=32,
        layer_types=["sliding_attention", "full_attention"] * 2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        dtype="float32", initializer_range=0.2,
    )  # fmt: skip
    Gemma3ForCausalLM(config).float().eval().save_pretrained(folder)
    return str(folder)


def test_a_draft_with_two_kinds_of_layers(gemma):
    """The model drafts for itself: all that it proposes is accepted, beyond the window too."""
    prompts, sampling = harness.prompts(2, seed=8, shortest=30, longest=60), {"ignore_eos": True, "max_tokens": 24}
    with harness.engine(gemma) as llm:
        expected = harness.token_ids(harness.generate(llm, prompts, **sampling))
    config = {"method": "specdecpp", "model": gemma, "rule": "fixed", "num_speculative_tokens": 6}
    with harness.engine(gemma, config) as llm:
        assert harness.token_ids(harness.generate(llm, prompts, **sampling)) == expected
        stats = llm.collective_rpc("specdecpp_stats")[0]
        assert stats["accepted"] > 0.98 * stats["candidates"] > 0


def test_a_target_with_two_kinds_of_layers_and_a_plain_draft(gemma, tiny):
    """vLLM gives a proposer the first kind's blocks: the draft would write over the target's KV."""
    prompts, sampling = harness.prompts(3, seed=9, shortest=30, longest=60), {"ignore_eos": True, "max_tokens": 24}
    with harness.engine(gemma) as llm:
        expected = harness.token_ids(harness.generate(llm, prompts, **sampling))
    config = {"method": "specdecpp", "model": str(tiny.draft_good), "rule": "fixed", "num_speculative_tokens": 6}
    with harness.engine(gemma, config) as llm:
        assert harness.token_ids(harness.generate(llm, prompts, **sampling)) == expected
        assert llm.collective_rpc("specdecpp_stats")[0]["candidates"] > 0


def _vllm_config(
    kinds: list[str] | None, *, hybrid: bool = False, v2: bool = False, target: list[str] | None = None
) -> Any:
    draft = SimpleNamespace(model="DRAFT", hf_text_config=SimpleNamespace(layer_types=kinds))
    return SimpleNamespace(
        speculative_config=SimpleNamespace(draft_model_config=draft), use_v2_model_runner=v2,
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        model_config=SimpleNamespace(is_hybrid=hybrid, hf_text_config=SimpleNamespace(layer_types=target)),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kinds", "options", "off"),
    [
        (["sliding_attention", "full_attention"], {}, True),
        (["sliding_attention", "full_attention"], {"v2": True}, False),
        (["full_attention"] * 2, {}, False),
        (["sliding_attention"] * 2, {}, True),  # the target's see everything
        (["sliding_attention"] * 2, {"target": ["sliding_attention"]}, False),
        (None, {}, False),
        (None, {"target": ["sliding_attention", "full_attention"]}, True),
        (None, {"target": ["sliding_attention", "full_attention"], "v2": True}, False),
    ],
)
def test_the_manager_is_turned_off_where_it_must_be(kinds, options, off):
    from vllm_specdecpp.engine.v1 import draft_layers

    config = _vllm_config(kinds, **options)
    draft_layers.keep_alike(config)
    assert config.scheduler_config.disable_hybrid_kv_cache_manager is off


@pytest.mark.parametrize(
    ("kinds", "options"),
    [(["linear_attention", "full_attention"], {}), (["sliding_attention", "full_attention"], {"hybrid": True})],
)
def test_what_cannot_be_kept_alike_is_refused_in_one_line(kinds, options):
    from vllm_specdecpp.engine.v1 import draft_layers

    with pytest.raises(ValueError, match="^specdecpp: model=.DRAFT. and its target keep .*choose other"):
        draft_layers.keep_alike(_vllm_config(kinds, **options))


@pytest.mark.parametrize("of_draft", [0, 1])
def test_a_draft_whose_blocks_are_not_those_it_is_given_is_refused(of_draft):
    from vllm_specdecpp.engine.v1 import draft_layers

    groups = [SimpleNamespace(layer_names=[name]) for name in (["draft", "target"], ["target", "draft"])[of_draft]]
    proposer = SimpleNamespace(config=SimpleNamespace(model="DRAFT"), _draft_attn_layer_names={"draft"})
    validate = draft_layers.worded(lambda self, config: None)
    if not of_draft:
        return validate(proposer, SimpleNamespace(kv_cache_groups=groups))
    with pytest.raises(ValueError, match="^specdecpp: model='DRAFT' and its target keep"):
        validate(proposer, SimpleNamespace(kv_cache_groups=groups))
