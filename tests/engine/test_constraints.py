# SPDX-License-Identifier: Apache-2.0
"""In an engine: a stream of penalty, grammar and allowed-token requests moves no other requests' estimates."""

from __future__ import annotations

from typing import Any

import pytest

from tests import engine_harness as harness
from vllm_specdecpp.costs import timing

NUM_PROMPTS, MAX_TOKENS = 4, 40


def _constraints() -> list[dict[str, Any]]:
    from vllm.sampling_params import StructuredOutputsParams

    return [
        {"repetition_penalty": 2.0, "ignore_eos": True},
        {"allowed_token_ids": list(range(3, 30)), "ignore_eos": True},
        {"structured_outputs": StructuredOutputsParams(regex=r"[0-9]{20}")},
    ]


@pytest.fixture(scope="module")
def llm(tiny, tmp_path_factory):
    config = {"method": "specdecpp", "model": tiny.draft_good, "num_speculative_tokens": 5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CACHE_ROOT", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(timing, "measure", lambda *args: harness.CHEAP)
        with harness.engine(tiny.target, config, skip_tokenizer_init=False) as llm:
            runner = harness.runner(llm)
            drafter = getattr(runner, "drafter", None) or runner.speculator
            harness.fix_costs(drafter.cost_aware, harness.CHEAP)
            yield llm


def _learnt(llm: Any) -> tuple[dict[str, Any], int]:
    """What the acceptance model says, and the candidates since the last call."""
    stats = llm.collective_rpc("specdecpp_stats", kwargs={"reset": True})[0]
    told = stats["cost_aware"]
    return told["calibration"] | {"mean": told["admission"]["acceptance"]}, stats["candidates"]


def test_constraints_teach_nobody_else(llm):
    prompts = harness.prompts(NUM_PROMPTS, seed=3)
    harness.generate(llm, prompts, ignore_eos=True, max_tokens=MAX_TOKENS)
    before, _ = _learnt(llm)
    for sampling in _constraints():
        harness.generate(llm, prompts, max_tokens=MAX_TOKENS, **sampling)
        after, candidates = _learnt(llm)
        assert candidates > 0 and after == before, sampling
    harness.generate(llm, prompts, ignore_eos=True, max_tokens=MAX_TOKENS)
    assert _learnt(llm)[0] != before  # the others go on teaching
