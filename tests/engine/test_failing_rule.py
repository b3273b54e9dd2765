# SPDX-License-Identifier: Apache-2.0
"""A rule with a bug, in a real engine: nothing is drafted any more, and all else goes on."""

from __future__ import annotations

from typing import Any

import pytest

from tests import engine_harness as harness
from tests.reference_loop import answer
from vllm_specdecpp.decision.cost_aware.admission import Admission
from vllm_specdecpp.decision.cost_aware.drafting import CostAwareRound
from vllm_specdecpp.decision.cost_aware.rule import CostAwareRule
from vllm_specdecpp.engine.shared import cost_aware

CHEAP = {"first": {1: 1e-3}, "step": {1: 1e-3}, "verify": {1: 20e-3, 64: 22e-3}}
PROMPTS = harness.prompts(4, seed=8)


@pytest.fixture(scope="module")
def llm(tiny):
    config = {"method": "specdecpp", "model": tiny.draft_good, "num_speculative_tokens": 5, "trace_rounds": 100_000}
    with harness.engine(tiny.target, config) as llm:
        harness.set_costs(llm, CHEAP)
        yield llm


@pytest.mark.parametrize("where", [(Admission, "plan"), (CostAwareRule, "finish"), (CostAwareRound, "follow")])
def test_a_rule_that_fails_ends_drafting_and_nothing_else(llm, reference, monkeypatch, where):
    host, errors = harness.proposer(llm).cost_aware, []
    host.has_failed = False
    host.drop_round()
    harness.take_rounds(llm)
    monkeypatch.setattr(cost_aware.logger, "exception", lambda *said: errors.append(said))
    calls, original = [0], getattr(*where)

    def fails_late(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 6:
            raise ZeroDivisionError("planted")
        return original(*args, **kwargs)

    monkeypatch.setattr(*where, fails_late)
    outputs = harness.token_ids(harness.generate(llm, PROMPTS, max_tokens=60, ignore_eos=True))
    assert outputs == [answer(reference("target"), prompt, 60) for prompt in PROMPTS]
    assert len(errors) == 1 and calls[0] == 6 and host.has_failed
    lengths = [len(r["candidates"]) for r in harness.take_rounds(llm)]
    assert any(lengths) and not any(lengths[-20:])
