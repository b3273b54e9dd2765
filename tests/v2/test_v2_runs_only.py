# SPDX-License-Identifier: Apache-2.0
"""Free runs without a draft model on Model Runner V2."""

from __future__ import annotations

from typing import Any

import pytest

from tests import engine_harness as harness
from tests import runs_only
from tests.engine.test_free_runs import PROMPTS
from tests.reference_loop import Rule, generate
from tests.v2 import async_on_cpu
from vllm_specdecpp.engine.v2 import free_runs
from vllm_specdecpp.engine.v2.free_runs import OldestFirst
from vllm_specdecpp.kernels.suffix_cache import match_others_torch


def speculator(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.speculator


@pytest.mark.parametrize("is_async", [False, True])
def test_greedy_output_is_the_targets(tiny, reference, monkeypatch, is_async):
    async_on_cpu.allow(monkeypatch)
    target, prompts = reference("target"), PROMPTS[:3]
    wanted = [
        generate(target, target, p, Rule("fixed", max_length=1), max_tokens=40, max_model_len=harness.MAX_MODEL_LEN)[1]
        for p in prompts
    ]
    with harness.engine(tiny.target, runs_only.CONFIG, async_scheduling=is_async) as llm:
        runs_only.check_greedy(llm, speculator(llm), prompts, wanted)


@pytest.mark.parametrize("is_async", [False, True])
def test_what_another_request_has_emitted_is_looked_in_if_asked_for(tiny, monkeypatch, is_async):
    async_on_cpu.allow(monkeypatch)
    with harness.engine(tiny.target, runs_only.OF_OTHERS, async_scheduling=is_async, max_num_seqs=3) as llm:
        first, second = runs_only.check_others(llm, speculator(llm), PROMPTS[0][:9])
        states = llm.llm_engine.model_executor.driver_worker.worker.model_runner.req_states
        assert isinstance(states.free_indices, OldestFirst)
        assert second < 0.6 * first, (first, second)
        monkeypatch.setattr(free_runs, "MOST_PAIRS", 0)
        assert max(runs_only.check_others(llm, speculator(llm), PROMPTS[0][:9])) > 0.6 * first, "too many to look in"


@pytest.mark.parametrize("config", [runs_only.CONFIG, runs_only.OF_OTHERS], ids=["own text", "others' as well"])
def test_sampled_output_follows_the_exact_law(tiny, reference, config):
    with harness.engine(
        tiny.small_target, config, max_model_len=64, max_num_seqs=128, max_num_batched_tokens=2048
    ) as llm:
        speculator(llm).runs.match_others = match_others_torch  # quicker than the interpreted kernel
        assert runs_only.law_p_value(llm, speculator(llm), reference("small_target").model, 256) > 1e-4
