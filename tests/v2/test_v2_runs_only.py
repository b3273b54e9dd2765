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
from tests.v2 import harness as v2_harness
from tests.v2.verified import Verified
from vllm_specdecpp.engine.v2 import free_runs
from vllm_specdecpp.engine.v2.free_runs import OldestFirst
from vllm_specdecpp.kernels.suffix_cache import match_others_torch

GREEDY_TOKENS, PROMPT = 16, PROMPTS[0][:9]


@pytest.mark.parametrize(
    ("config", "is_async"), [(runs_only.CONFIG, True), (runs_only.OF_OTHERS, False), (runs_only.OF_OTHERS, True)],
    ids=["own text, asynchronous", "others' as well", "others' as well, asynchronous"],
)  # fmt: skip
def test_runs_are_verified_as_certain_and_leave_greedy_output_alone(tiny, reference, monkeypatch, config, is_async):
    """Greedy output is the target's; what others have emitted is looked in if asked for; sampled, rows are the
    target's."""
    async_on_cpu.allow(monkeypatch)
    target, prompts = reference("target"), PROMPTS[:3]
    rule = Rule("fixed", max_length=1)
    wanted = [
        generate(target, target, p, rule, max_tokens=GREEDY_TOKENS, max_model_len=harness.MAX_MODEL_LEN)[1]
        for p in prompts
    ]
    with harness.engine(tiny.target, config, async_scheduling=is_async, max_num_seqs=3) as llm:
        speculator = v2_harness.speculator_of(llm)
        runs_only.check_greedy(llm, speculator, prompts, wanted)
        if "suffix_cache" in config:
            first = _check_others(llm, speculator)
            if not is_async:
                monkeypatch.setattr(free_runs, "MOST_PAIRS", 0)
                assert max(runs_only.check_others(llm, speculator, PROMPT)) > 0.6 * first, "too many to look in"
        runs_only.set_costs(speculator, runs_only.FLAT)
        verified = Verified(monkeypatch, llm, target, None)
        harness.generate(llm, prompts, max_tokens=GREEDY_TOKENS, ignore_eos=True, temperature=1.0)
    assert verified.num_runs >= 5 and verified.num_drafted == 0


def _check_others(llm: Any, speculator: Any) -> int:
    """Returns the rounds of a request that knows of no other."""
    first, second = runs_only.check_others(llm, speculator, PROMPT)
    assert isinstance(speculator.runner.req_states.free_indices, OldestFirst)
    assert second < 0.6 * first, (first, second)
    return first


@pytest.mark.slow
@pytest.mark.parametrize("config", [runs_only.CONFIG, runs_only.OF_OTHERS], ids=["own text", "others' as well"])
def test_sampled_output_follows_the_exact_law(tiny, reference, config):
    with harness.engine(
        tiny.small_target, config, max_model_len=64, max_num_seqs=128, max_num_batched_tokens=2048
    ) as llm:
        speculator = v2_harness.speculator_of(llm)
        speculator.runs.match_others = match_others_torch  # quicker than the interpreted kernel
        assert runs_only.law_p_value(llm, speculator, reference("small_target").model, 256) > 1e-4
