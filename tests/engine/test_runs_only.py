# SPDX-License-Identifier: Apache-2.0
"""Free runs without a draft model on Model Runner V1."""

from __future__ import annotations

import pytest

from tests import engine_harness as harness
from tests import runs_only
from tests.engine.test_free_runs import PROMPTS


def test_greedy_output_and_memory_are_those_without_speculation(tiny):
    with harness.engine(tiny.target) as llm:
        wanted = harness.token_ids(harness.generate(llm, PROMPTS, ignore_eos=True))
        runner = harness.runner(llm)
        layers = [sorted(group.layer_names) for group in runner.kv_cache_config.kv_cache_groups]
    for config in (runs_only.CONFIG, runs_only.OF_OTHERS):
        with harness.engine(tiny.target, config, enable_prefix_caching=True) as llm:
            runner = harness.proposer(llm).runner
            assert [sorted(group.layer_names) for group in runner.kv_cache_config.kv_cache_groups] == layers
            runs_only.check_greedy(llm, harness.proposer(llm), PROMPTS, wanted)


def test_what_another_request_has_emitted_is_looked_in_if_asked_for(tiny):
    rounds = {}
    for config in (runs_only.CONFIG, runs_only.OF_OTHERS):
        with harness.engine(tiny.target, config) as llm:
            first, second = runs_only.check_others(llm, harness.proposer(llm), PROMPTS[0][:9])
        rounds[config.get("suffix_cache")] = first, second
    first, second = rounds["engine"]
    assert second < 0.6 * first and second < 0.6 * rounds[None][1], rounds


@pytest.mark.parametrize("config", [runs_only.CONFIG, runs_only.OF_OTHERS], ids=["own text", "others' as well"])
def test_sampled_output_follows_the_exact_law(tiny, reference, monkeypatch, config):
    with harness.engine(tiny.small_target, config, **harness.SMALL) as llm:
        model, drafter = reference("small_target").model, harness.proposer(llm)
        assert runs_only.law_p_value(llm, drafter, model, 2048) > 1e-4
        # Runs that are accepted too often are noticed.
        sampler = drafter.runner.rejection_sampler
        monkeypatch.setattr(sampler, "apply_logits_processors", lambda logits, *args: 0 * logits)
        assert runs_only.law_p_value(llm, drafter, model, 2048) < 1e-9


def test_a_draft_model_that_would_never_draft_is_refused(tiny):
    says = pytest.raises(ValueError, match="would never draft with sources=.*; leave one of the two out")
    with says, harness.engine(tiny.target, {**runs_only.CONFIG, "model": tiny.draft_good}):
        pass
