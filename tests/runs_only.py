# SPDX-License-Identifier: Apache-2.0
"""An engine without a draft model, under either runner: it takes runs where they pay, and follows the target's law."""

from __future__ import annotations

from typing import Any

from tests import engine_harness as harness
from tests.exact_law import joint_law, p_value
from vllm_specdecpp.decision.cost_aware import CostModel

CONFIG = {"method": "specdecpp", "sources": ["suffix"], "num_speculative_tokens": 6, "trace_rounds": 100_000}
OF_OTHERS = {**CONFIG, "suffix_cache": "engine"}
PROMPT, LENGTH = [3, 5, 3, 7, 3], 3
FLAT, STEEP = {1: 20e-3, 64: 20.1e-3}, {1: 20e-3, 2: 200e-3, 64: 6.0}
"""Seconds of verifications: rows cost nothing; each row costs far more than a token is worth."""


def set_costs(drafter: Any, verify: dict[int, float]) -> None:
    """Give the rule these costs for good."""
    costs: Any = CostModel(verify, verify, verify, max_reqs=256, max_tokens=4096)
    costs.observe_draft = costs.verify.observe = lambda *args: None
    drafter.cost_aware.rule.costs, drafter.cost_aware._overheads = costs, None


def check_greedy(llm: Any, drafter: Any, prompts: list[list[int]], wanted: list[list[int]]) -> None:
    """Output is the target's; runs are taken where rows cost nothing, and none where they cost too much."""
    assert getattr(drafter, "model", None) is None
    for verify, some in ((FLAT, True), (STEEP, False)):
        set_costs(drafter, verify)
        llm.collective_rpc("specdecpp_stats", kwargs={"reset": True})
        outputs = harness.generate(llm, prompts, ignore_eos=True, max_tokens=max(map(len, wanted)))
        assert harness.token_ids(outputs) == wanted
        stats = llm.collective_rpc("specdecpp_stats")[0]
        assert stats["draft_passes"] == 0 and bool(stats["candidates"]) == some, stats
        assert stats["rounds"] > 20


def check_others(llm: Any, drafter: Any, prompt: list[int]) -> list[int]:
    """The same prompt twice: what the first request has emitted the second need not find out again. Returns the rounds
    of each."""
    set_costs(drafter, FLAT)
    llm.collective_rpc("specdecpp_stats", kwargs={"reset": True})
    rounds: list[int] = []
    texts = []
    for _ in range(2):
        texts.append(harness.token_ids(harness.generate(llm, [prompt], max_tokens=40, ignore_eos=True)))
        stats = llm.collective_rpc("specdecpp_stats", kwargs={"reset": True})[0]
        rounds.append(stats["rounds"])
    assert texts[0] == texts[1]
    return rounds


def law_p_value(llm: Any, drafter: Any, model: Any, num: int) -> float:
    """Of ``num`` samples at temperature 1, runs among the candidates; ``model``: the target."""
    set_costs(drafter, FLAT)
    harness.take_rounds(llm)
    samples = harness.first_tokens(llm, PROMPT, num, LENGTH, 1, temperature=1.0)
    rounds = harness.take_rounds(llm)
    assert num / 4 < sum(len(r["candidates"]) for r in rounds) and 0.05 < harness.accepted_share(rounds) < 0.95
    return p_value(samples, joint_law(model, PROMPT, LENGTH, 1.0))
