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


def test_sampled_output_follows_the_exact_law(tiny, reference):
    with harness.engine(
        tiny.small_target, runs_only.CONFIG, max_model_len=64, max_num_seqs=128, max_num_batched_tokens=2048
    ) as llm:
        assert runs_only.law_p_value(llm, speculator(llm), reference("small_target").model, 256) > 1e-4
