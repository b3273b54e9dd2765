# SPDX-License-Identifier: Apache-2.0
"""Free runs in a V2 engine: greedy output is the target's in any mix with drafts, and what the draft says is right."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from tests import engine_harness as harness
from tests.reference_loop import Rule, generate
from tests.v2 import async_on_cpu
from tests.v2 import harness as v2_harness
from vllm_specdecpp.costs import timing
from vllm_specdecpp.decision.cost_aware.admission import Admitted
from vllm_specdecpp.decision.cost_aware.drafting import CostAwareRound
from vllm_specdecpp.decision.sources.suffix import longest_match

MAX_LENGTH, MAX_TOKENS = 5, 24
PART = harness.prompts(1, seed=7, shortest=12, longest=12)[0]
PROMPTS = [[*p, *PART[: 4 + i], *p[::2], *PART[: 2 + i]] for i, p in enumerate(harness.prompts(3, seed=5, longest=30))]
CURVES = {"first": {1: 1e-3}, "step": {1: 1e-3}, "verify": {1: 20e-3, 64: 22e-3}}


@pytest.mark.parametrize("is_async", [False, True])
def test_any_mix_of_runs_and_drafts_leaves_greedy_output_alone(tiny, reference, monkeypatch, is_async):
    """Who drafts is drawn; the others take what V1 would find, or nothing."""
    monkeypatch.setattr(timing, "measure", lambda *args: CURVES)
    rule, draw = Rule("fixed", max_length=1), random.Random(4)
    target, draft = reference("target"), reference("draft_good")
    wanted = [
        generate(target, draft, p, rule, max_tokens=MAX_TOKENS, max_model_len=harness.MAX_MODEL_LEN)[1] for p in PROMPTS
    ]

    def begin(batch: Any, runs: Any = ()) -> CostAwareRound:
        assert runs is None
        limits = np.array([min(s.limit, draw.randint(1, MAX_LENGTH)) for s in batch])
        drafts = (limits > 0) & (np.array([draw.random() for _ in batch]) < 0.4)
        names = [s.request_id for s in batch]
        return CostAwareRound(held, names, limits, drafts, 0.0, Admitted(drafts, 0.0, 1.0, 1.0))

    config = {
        "method": "specdecpp", "model": tiny.draft_good, "num_speculative_tokens": MAX_LENGTH, "trace_rounds": 100_000,
        "sources": ["suffix", "draft_model"],
    }  # fmt: skip
    async_on_cpu.allow(monkeypatch)
    with harness.engine(tiny.target, config, async_scheduling=is_async, enable_prefix_caching=True) as llm:
        held: Any = v2_harness.fix_costs(llm, CURVES).rule
        held.begin = begin
        outputs = harness.generate(llm, PROMPTS, max_tokens=MAX_TOKENS, ignore_eos=True)
        rounds = harness.rounds_of(outputs, harness.take_rounds(llm))
        stats = llm.collective_rpc("specdecpp_stats")[0]["cost_aware"]["sources"]["suffix"]
    assert harness.token_ids(outputs) == wanted
    num_runs = num_drafts = num_won = 0
    for prompt, tokens, mine in zip(PROMPTS, wanted, rounds, strict=True):
        context = [*prompt, tokens[0]]
        for candidates, accepted, next_token in mine:
            start, match = longest_match(np.array(context))
            run = np.resize(context[start:], len(candidates)).tolist() if match else []
            drawn = [draft.steps([*context, *candidates[:k]])[0].token for k in range(len(candidates))]
            assert candidates in (run, drawn)
            num_drafts += bool(candidates) and candidates == drawn
            num_runs += candidates != drawn
            num_won += candidates != drawn and accepted >= 2  # tokens that the draft model has not read
            context += [*candidates[:accepted], next_token]
    assert num_drafts > 5 and num_runs > 5 and num_won > 0, (num_drafts, num_runs, num_won)
    assert stats["candidates"] > 5 and stats["accepted"] > 0
