# SPDX-License-Identifier: Apache-2.0
"""Free runs in a V2 engine: greedy output is the target's in any mix with drafts, and what the draft says is right."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from tests import engine_harness as harness
from tests.reference_loop import Rule, generate
from tests.v2 import async_on_cpu
from tests.v2 import harness as v2_harness
from vllm_specdecpp.costs import timing
from vllm_specdecpp.decision.cost_aware.admission import Admitted
from vllm_specdecpp.decision.cost_aware.drafting import CostAwareRound

MAX_LENGTH, MAX_TOKENS = 5, 24
PROMPTS = harness.prompts(3, seed=5, longest=30)
CURVES = {"first": {1: 1e-3}, "step": {1: 1e-3}, "verify": {1: 20e-3, 64: 22e-3}}


def know(speculator: Any, texts: list[list[int]], draw: random.Random) -> dict[tuple[int, ...], list[int]]:
    """In place of the runs that are found: what the target will say, and now and then something else.

    Returns:
        A request's tokens -> what was drafted behind them; to be filled.
    """
    runs, find, follow = speculator.runs, speculator.runs.find, speculator.runs.follow
    assert not hasattr(speculator.runner.req_states.all_token_ids, "_uva_buf"), "searched over the bus"
    drafts: dict[tuple[int, ...], list[int]] = {}

    def known(tail: Any, behind: bool) -> None:
        batch, state = runs._batch, speculator.round
        matches, taken = runs._found[-1]
        lengths = torch.zeros_like(taken.lengths)
        for row in range(batch.num_reqs):
            if not state.max_lengths[row] or behind != bool(tail.drafts[row]):
                continue
            drafted = state.draft_tokens[row, : state.lengths[row]].tolist() if behind else []
            end = int(state.next_positions[row]) + 1
            held = speculator.runner.req_states.all_token_ids.gpu[batch.idx_mapping[row], :end].tolist()
            if behind:
                drafts[tuple(held)] = drafted
            (text,) = {tuple(t) for t in texts if t[:end] == held}
            start = end + len(drafted)
            run = [draw.choice([t] * 9 + [3]) for t in text[start : end + state.max_lengths[row]]]
            runs._candidates[row] = -1
            runs._candidates[row, len(drafted) : len(drafted) + len(run)] = torch.tensor(run, dtype=torch.int64)
            lengths[row] = len(run)
        runs._found[-1] = torch.ones_like(matches), taken._replace(lengths=lengths)

    def found(batch: Any, tail: Any) -> None:
        find(batch, tail)
        known(tail, behind=False)

    def followed(tail: Any) -> None:
        follow(tail)
        known(tail, behind=True)

    runs.find, runs.follow = found, followed
    return drafts


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.asks(11)
def test_any_mix_of_runs_and_drafts_leaves_greedy_output_alone(tiny, reference, monkeypatch, is_async):
    """Who drafts is drawn; runs go on behind the drafts, and in their place, many of them right, so that the draft
    model falls behind."""
    monkeypatch.setattr(timing, "measure", lambda *args: CURVES)
    rule, draw, planned = Rule("fixed", max_length=1), random.Random(4), [0]
    target, draft = reference("target"), reference("draft_good")
    wanted = [
        generate(target, draft, p, rule, max_tokens=MAX_TOKENS, max_model_len=harness.MAX_MODEL_LEN)[1] for p in PROMPTS
    ]

    def begin(batch: Any, runs: Any = ()) -> CostAwareRound:
        assert runs is None
        limits = np.array([min(s.limit, draw.randint(1, MAX_LENGTH)) for s in batch])
        drafts = (limits > 0) & (np.array([draw.random() for _ in batch]) < 0.4)
        planned[0] += int(drafts.sum())
        names = [s.request_id for s in batch]
        return CostAwareRound(held, names, limits, drafts, 0.0, Admitted(drafts, 0.0, 1.0))

    config = {
        "method": "specdecpp", "model": tiny.draft_good, "num_speculative_tokens": MAX_LENGTH, "trace_rounds": 100_000,
        "sources": ["suffix", "draft_model"],
    }  # fmt: skip
    async_on_cpu.allow(monkeypatch)
    with harness.engine(tiny.target, config, async_scheduling=is_async, enable_prefix_caching=True) as llm:
        held: Any = v2_harness.fix_costs(llm, CURVES).rule
        held.begin = begin
        speculator = llm.llm_engine.model_executor.driver_worker.worker.model_runner.speculator
        drafts = know(speculator, [prompt + tokens for prompt, tokens in zip(PROMPTS, wanted, strict=True)], draw)
        outputs = harness.generate(llm, PROMPTS, max_tokens=MAX_TOKENS, ignore_eos=True)
        rounds = harness.rounds_of(outputs, harness.take_rounds(llm))
        stats = llm.collective_rpc("specdecpp_stats")[0]["cost_aware"]["sources"]["suffix"]
    assert harness.token_ids(outputs) == wanted
    num_runs = num_behind = num_drafts = num_won = 0
    for prompt, tokens, mine in zip(PROMPTS, wanted, rounds, strict=True):
        context = [*prompt, tokens[0]]
        for candidates, accepted, next_token in mine:
            drawn: list[int] = []
            for _ in candidates:
                drawn.append(draft.steps([*context, *drawn])[0].token)
            drafted = drafts.get(tuple(context), [])[: len(candidates)]
            size = len(drafted)
            assert candidates[:size] == drafted == drawn[:size]
            num_drafts += bool(drafted)
            num_runs += len(candidates) > size
            num_behind += len(candidates) > size > 0
            num_won += accepted > max(size, 1)  # tokens that the draft model has not read
            context += [*candidates[:accepted], next_token]
    counts = num_drafts, num_runs, num_behind, num_won
    assert min(counts) >= 4, counts
    # Of a request's last rounds the outcome is not seen, and with asynchronous scheduling one more has begun.
    assert num_drafts >= planned[0] - 3 * len(PROMPTS), (num_drafts, planned)
    assert stats["candidates"] > stats["accepted"] > 10
