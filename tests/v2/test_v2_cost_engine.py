# SPDX-License-Identifier: Apache-2.0
"""The default rule in an engine of its own on V2: passes are timed, it drafts where that pays, and it is lossless."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests import engine_harness as harness
from tests.reference_loop import answer
from tests.v2 import harness as v2_harness
from vllm_specdecpp.costs import timing

MAX_LENGTH, MAX_TOKENS = 5, 14
PROMPTS = harness.prompts(4, seed=31, longest=60)
CHEAP = {"first": {1: 1e-3}, "step": {1: 1e-3}, "verify": {1: 20e-3, 64: 22e-3}}
"""Seconds: drafting is well worth it."""
DEAR = {"first": {1: 1e-3}, "step": {1: 20e-3}, "verify": {1: 20e-3, 2: 60e-3, 64: 2.0}}
"""Seconds: drafting never is."""
LONG = {"first": {1: 40e-3}, "step": {1: 1e-3}, "verify": {1: 20e-3, 64: 22e-3}, "read": {1: 40e-3}}
"""Seconds: one candidate is not worth its pass, many are if the draft is mostly right."""


def _speculator(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.speculator


def _no_measure(*args: Any) -> Any:
    raise AssertionError("measured again")


@pytest.fixture(scope="module")
def llm(tiny, tmp_path_factory):
    """Prompts in chunks, some of them from the prefix cache."""
    config = {
        "method": "specdecpp", "model": tiny.draft_good, "num_speculative_tokens": MAX_LENGTH, "trace_rounds": 100_000,
        "sources": ["draft_model"],
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CACHE_ROOT", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(timing, "MOST", 0.3)
        with harness.engine(tiny.target, config, enable_prefix_caching=True, max_num_batched_tokens=48) as llm:
            patch.setattr(timing, "measure", _no_measure)
            yield llm


@pytest.fixture(scope="module")
def wanted(reference):
    return [answer(reference("target"), prompt, MAX_TOKENS) for prompt in PROMPTS]


def _run(llm: Any, wanted: Any, reference: Any) -> list[Any]:
    """Generates, checks every token and every candidate, and gives the rounds."""
    outputs = harness.generate(llm, PROMPTS, max_tokens=MAX_TOKENS, ignore_eos=True)
    assert harness.token_ids(outputs) == wanted
    rounds = harness.rounds_of(outputs, harness.take_rounds(llm))
    draft = reference("draft_good")
    for prompt, tokens, mine in zip(PROMPTS, wanted, rounds, strict=True):
        context = [*prompt, tokens[0]]
        for candidates, accepted, next_token in mine:
            assert candidates == [draft.steps([*context, *candidates[:k]])[0].token for k in range(len(candidates))]
            context += [*candidates[:accepted], next_token]
    return [len(candidates) for mine in rounds for candidates, *_ in mine]


def test_passes_are_timed_and_the_costs_kept(llm, wanted, reference, caplog):
    speculator = _speculator(llm)
    cost_aware = speculator.cost_aware
    points = cost_aware.rule.costs.points()
    assert all(len(curve) >= 4 and min(curve.values()) > 0 for curve in points.values())
    assert max(points["verify"]) > 4 >= max(points["step"])
    for _ in range(2):
        _run(llm, wanted, reference)  # real times
    told = json.loads(json.dumps(llm.collective_rpc("specdecpp_stats", kwargs={"reset": True})[0]))["cost_aware"]
    assert told["admission"]["looks"] > 0 and told["costs"].keys() == {"first", "step", "verify", "read"}
    assert sum(told["calibration"]["reliability"]["num"]) > 0
    assert cost_aware._overheads is None  # what the passes did not show is known by now
    cost_aware.save()
    assert cost_aware.file.setting["model_runner"] == "V2/eager"
    speculator.cost_aware = None
    speculator.start_cost_aware()  # from the file: nothing may be measured again
    assert speculator.cost_aware is not cost_aware
    assert "going on with what was learnt" in caplog.text
    mine, theirs = (made.rule.admission.records for made in (speculator.cost_aware, cost_aware))
    assert (mine.mean, mine.known) == pytest.approx((theirs.mean, theirs.known), rel=0.01) and mine.known > 0
    for name, curve in speculator.cost_aware.rule.costs.points().items():
        assert curve == pytest.approx(cost_aware.rule.costs.points(lasting=True)[name]), name


@pytest.mark.asks(1)
def test_drafts_where_it_pays_and_next_to_nothing_where_it_does_not(llm, wanted, reference):
    """The draft's KV is right after any number of rounds that drafted nothing."""
    v2_harness.fix_costs(llm, CHEAP)
    lengths = _run(llm, wanted, reference)
    assert sum(lengths) > 1.5 * len(lengths) and len(set(lengths)) >= 4
    v2_harness.fix_costs(llm, DEAR)
    llm.reset_prefix_cache()
    llm.collective_rpc("specdecpp_stats", kwargs={"reset": True})
    lengths = _run(llm, wanted, reference)
    assert sum(lengths) < 0.2 * len(lengths)
    assert llm.collective_rpc("specdecpp_stats")[0]["draft_passes"] < 0.2 * len(lengths)  # K = 0 runs none
    v2_harness.fix_costs(llm, CHEAP)
    lengths = _run(llm, wanted, reference)
    assert sum(lengths) > len(lengths)


def test_a_cold_engine_drafts_where_only_long_drafts_pay(llm, wanted, reference):
    """Nobody knows yet how often the draft is right: that is tried at once, and as long as it has to be."""
    harness.forget(v2_harness.fix_costs(llm, LONG).rule)
    harness.take_rounds(llm)
    outputs = harness.generate(llm, PROMPTS, max_tokens=MAX_TOKENS, ignore_eos=True)
    assert harness.token_ids(outputs) == wanted
    assert max(len(r["candidates"]) for r in harness.take_rounds(llm)[:8]) >= 4


def test_another_rule_and_back(llm, wanted, reference):
    rule = v2_harness.fix_costs(llm, CHEAP).rule
    harness.configure(llm, rule="fixed")
    assert max(_run(llm, wanted, reference)) == MAX_LENGTH
    harness.configure(llm, rule="cost_aware", num_speculative_tokens=2)
    assert max(_run(llm, wanted, reference)) == 2
    assert _speculator(llm).cost_aware.rule is rule  # what it has learnt is kept
    harness.configure(llm, num_speculative_tokens=MAX_LENGTH)
