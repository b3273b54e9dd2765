# SPDX-License-Identifier: Apache-2.0
"""The engine's rounds on Model Runner V2 equal the reference loop's, one by one: candidates, accepted counts, tokens.

With a draft that is often right and one that is nearly always wrong; one that is always right is in
``test_v2_draft_limit``.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests import engine_harness as harness
from tests.engine import test_parity as v1
from tests.engine.test_parity import assert_parity, configure, make_rule
from tests.reference_loop import generate, load_head

MAX_LENGTH, MAX_TOKENS = 8, 20
PROMPTS = harness.prompts(5, seed=2)
STOP_IDS = frozenset({2})
BLOCK_SIZE = 32
"""Of the V2 runner's kernels on a CPU: a multiple of 32."""

CASES: list[dict[str, Any]] = [
    {"rule": "threshold", "threshold": 0.5, "num_speculative_tokens": MAX_LENGTH},
    {"rule": "entropy", "threshold": 0.9, "num_speculative_tokens": MAX_LENGTH},
    {"rule": "confidence", "threshold": 0.6, "min_speculative_tokens": 3, "num_speculative_tokens": 6},
    {"rule": "fixed", "num_speculative_tokens": 5},
]


@pytest.fixture(scope="module", params=["draft_good", "draft_rand"])
def pair(request, tiny):
    """An engine, and the name of its draft."""
    config = {
        "method": "specdecpp", "model": getattr(tiny, request.param), "head": tiny.head, "rule": "threshold",
        "num_speculative_tokens": MAX_LENGTH, "trace_rounds": 100_000,
    }  # fmt: skip
    with harness.engine(tiny.target, config, block_size=BLOCK_SIZE) as llm:
        yield llm, request.param


@pytest.fixture(scope="module")
def expected(tiny, reference):
    head = load_head(tiny.head)

    def run(draft: str, case: dict[str, Any], stop_ids: frozenset[int]) -> list[Any]:
        return [
            generate(
                reference("target"), reference(draft), prompt, make_rule(case, head, stop_ids),
                max_tokens=MAX_TOKENS, max_model_len=harness.MAX_MODEL_LEN, stop_ids=stop_ids,
            )
            for prompt in PROMPTS
        ]  # fmt: skip

    return run


@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(map(str, c.values())) for c in CASES])
def test_rounds_equal_the_reference(pair, expected, case):
    llm, draft = pair
    ignore_eos = case % 2 == 1  # both kinds of ending
    if draft != "draft_good" and case != 2:
        pytest.skip("one rule is enough for a draft that is nearly always wrong")
    configure(llm, CASES[case])
    harness.take_rounds(llm)
    with harness.verified_rounds(llm) as verified:
        outputs = harness.generate(llm, PROMPTS, max_tokens=MAX_TOKENS, ignore_eos=ignore_eos)
    want = expected(draft, CASES[case], frozenset() if ignore_eos else STOP_IDS)
    mine = harness.rounds_of(outputs, harness.take_rounds(llm))
    assert_parity(mine, want)
    # What the scheduler had verified were those very lists: no room was booked for more.
    assert harness.rounds_of(outputs, verified) == mine
    assert harness.token_ids(outputs) == [tokens for _, tokens in want]


def test_counters_equal_the_rounds(pair):
    """At batch 1 each candidate costs one draft pass, and every round has a first pass."""
    llm, draft = pair
    if draft != "draft_good":
        pytest.skip("one draft is enough")
    configure(llm, CASES[0])
    harness.take_rounds(llm)
    llm.collective_rpc("specdecpp_stats", kwargs={"reset": True})
    outputs = [o for p in PROMPTS[:3] for o in harness.generate(llm, [p], max_tokens=MAX_TOKENS, ignore_eos=True)]
    rounds = harness.take_rounds(llm)
    stats = llm.collective_rpc("specdecpp_stats")[0]
    num_candidates = sum(len(r["candidates"]) for r in rounds)
    assert stats["rounds"] == len(rounds)
    assert stats["candidates"] == num_candidates
    # The pass after a request's last round drafts for nobody.
    assert stats["draft_passes"] == num_candidates + 3 + sum(not r["candidates"] for r in rounds)
    assert stats["emitted"] == stats["accepted"] + len(rounds)
    assert stats["emitted"] >= sum(len(t) for t in harness.token_ids(outputs)) - 3
    assert sum(length * n for length, n in stats["lengths"].items()) == num_candidates


@pytest.mark.asks(2)
def test_nothing_runs_while_everybody_is_switched_off(pair):
    """Nobody will read the draft model's KV, so it is not written."""
    llm, draft = pair
    if draft != "draft_good":
        pytest.skip("one draft is enough")
    configure(llm, CASES[2])
    llm.collective_rpc("specdecpp_stats", kwargs={"reset": True})
    off = {"extra_args": {"specdecpp": "off"}, "max_tokens": 6, "ignore_eos": True}
    harness.generate(llm, harness.prompts(2), **off)
    stats = llm.collective_rpc("specdecpp_stats", kwargs={"reset": True})[0]
    assert (stats["draft_passes"], stats["candidates"]) == (0, 0)
    harness.generate(llm, harness.prompts(1), max_tokens=6, ignore_eos=True)
    assert llm.collective_rpc("specdecpp_stats")[0]["candidates"] > 0


def test_configure_refuses_bad_values(pair, monkeypatch):
    monkeypatch.setattr(v1, "MAX_LENGTH", MAX_LENGTH)
    v1.test_configure_refuses_bad_values(pair[0])


def test_what_v1_alone_records_is_refused(pair):
    llm, _ = pair
    with pytest.raises(ValueError, match="^specdecpp: .*VLLM_USE_V2_MODEL_RUNNER=0"):
        llm.collective_rpc("specdecpp_flush_records", args=(None, {}))
