# SPDX-License-Identifier: Apache-2.0
"""The engine's rounds equal the reference loop's, one by one: candidates, accepted counts, tokens.

Identical output alone proves nothing about the drafter, since verification repairs whatever it proposes.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests import engine_harness as harness
from tests.reference_loop import Rule, generate, load_head

MAX_LENGTH = 20
PROMPTS = harness.prompts(24)
MAX_TOKENS = 32
STOP_IDS = frozenset({2})

CASES: list[dict[str, Any]] = [
    {"rule": "threshold", "threshold": 0.5},
    {"rule": "threshold", "threshold": 0.7},
    {"rule": "threshold", "threshold": 0.95},
    {"rule": "threshold", "threshold": 0.7, "min_speculative_tokens": 4, "num_speculative_tokens": 7},
    {"rule": "confidence", "threshold": 0.6},
    {"rule": "confidence", "threshold": 0.95},
    {"rule": "confidence", "threshold": 0.3, "min_speculative_tokens": 3, "num_speculative_tokens": 5},
    {"rule": "entropy", "threshold": 0.6},
    {"rule": "entropy", "threshold": 0.95},
    {"rule": "fixed", "num_speculative_tokens": 1},
    {"rule": "fixed", "num_speculative_tokens": 6},
]
PLAYED = [*((1, case) for case in (0, 5, 7, 10)), *((4, case) for case in (1, 2, 3, 4, 6, 8, 9, 10))]
"""Batch and case: each rule alone, where answers end at EOS, and in batches, whose requests live equally long."""


def _id(batch: int, case: int) -> str:
    return "-".join(map(str, [batch, *CASES[case].values()]))


@pytest.fixture(scope="module")
def llm(tiny):
    config = {
        "method": "specdecpp", "model": tiny.draft_good, "head": tiny.head,
        "num_speculative_tokens": MAX_LENGTH, "trace_rounds": 100_000,
    }  # fmt: skip
    with harness.engine(tiny.target, config) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(tiny, reference):
    """(case, ignores EOS) → the reference loop's rounds and tokens for every prompt, computed once."""
    head = load_head(tiny.head)

    @functools.cache
    def run(case_index: int, ignore_eos: bool):
        stop_ids = frozenset() if ignore_eos else STOP_IDS
        rule = make_rule(CASES[case_index], head, stop_ids)
        return [
            generate(
                reference("target"), reference("draft_good"), prompt, rule,
                max_tokens=MAX_TOKENS, max_model_len=harness.MAX_MODEL_LEN, stop_ids=stop_ids,
            )
            for prompt in PROMPTS
        ]  # fmt: skip

    return run


def make_rule(case: dict[str, Any], head: Any, eos_ids: frozenset[int] = frozenset()) -> Rule:
    """The oracle's form of a ``specdecpp_configure`` call."""
    return Rule(
        case["rule"], case.get("threshold", 1.0), head, eos_ids=eos_ids,
        max_length=case.get("num_speculative_tokens", MAX_LENGTH), min_length=case.get("min_speculative_tokens", 1),
    )  # fmt: skip


def configure(llm: Any, case: dict[str, Any]) -> None:
    """Put a case in force, with the defaults for what it does not name."""
    defaults = {"threshold": None, "min_speculative_tokens": 1, "num_speculative_tokens": MAX_LENGTH}
    harness.configure(llm, **{**defaults, **case})


def assert_parity(actual: list[list[tuple[list[int], int, int]]], expected: list[Any]) -> None:
    """Every round of every request; the message names the first that differs."""
    for request, (mine, (rounds, _)) in enumerate(zip(actual, expected, strict=True)):
        theirs = [(r.candidates, r.accepted, r.next_token) for r in rounds]
        for index, (a, b) in enumerate(zip(mine, theirs, strict=False)):
            assert a == b, f"request {request}, round {index}: engine {a}, reference {b}"
        assert len(mine) == len(theirs), f"request {request}: {len(mine)} rounds, reference {len(theirs)}"


def test_cases_are_informative(expected):
    """The cases must see many lengths, rejections and EOS, or parity would show little."""
    rounds = [r for batch, case in PLAYED for rs, _ in expected(case, batch > 1) for r in rs]
    lengths = {len(r.candidates) for r in rounds}
    assert set(range(1, 15)) <= lengths
    rejected = sum(r.accepted < len(r.candidates) for r in rounds)
    assert 0.2 < rejected / len(rounds) < 0.8
    assert any(r.candidates and r.candidates[-1] in STOP_IDS for r in rounds)


@pytest.mark.parametrize(("batch", "case"), PLAYED, ids=[_id(*played) for played in PLAYED])
def test_rounds_equal_the_reference(llm, expected, batch, case):
    configure(llm, CASES[case])
    harness.take_rounds(llm)
    ignore_eos = batch > 1
    chunks, every = ([[p] for p in PROMPTS[::2]], 2) if batch == 1 else ([PROMPTS], 1)
    with harness.verified_rounds(llm) as verified:
        outputs = [o for c in chunks for o in harness.generate(llm, c, max_tokens=MAX_TOKENS, ignore_eos=ignore_eos)]
    want = expected(case, ignore_eos)[::every]
    assert_parity(harness.rounds_of(outputs, verified), want)
    # The proposer's own log tells the same; within a step it goes by row, not in the scheduler's order.
    assert harness.rounds_of(outputs, harness.take_rounds(llm)) == harness.rounds_of(outputs, verified)
    assert harness.token_ids(outputs) == [tokens for _, tokens in want]


def test_counters_equal_the_rounds(llm):
    """``specdecpp_stats`` sums what ``specdecpp_rounds`` lists; at batch 1 each candidate costs one draft pass."""
    configure(llm, CASES[1])
    harness.take_rounds(llm)
    llm.collective_rpc("specdecpp_stats", kwargs={"reset": True})
    outputs = [o for p in PROMPTS[:8] for o in harness.generate(llm, [p], max_tokens=MAX_TOKENS, ignore_eos=True)]
    rounds = harness.take_rounds(llm)
    stats = llm.collective_rpc("specdecpp_stats")[0]
    num_candidates = sum(len(r["candidates"]) for r in rounds)
    assert stats["rounds"] == len(rounds)
    assert stats["candidates"] == num_candidates == stats["draft_passes"]
    assert stats["accepted"] == sum(r["accepted"] for r in rounds)
    assert stats["emitted"] == stats["accepted"] + len(rounds) == sum(len(t) for t in harness.token_ids(outputs)) - 8
    assert sum(length * n for length, n in stats["lengths"].items()) == num_candidates


def test_configure_refuses_bad_values(llm):
    """A refused change leaves the old rule in force."""
    configure(llm, CASES[1])
    for changes in ({"threshold": 1.5}, {"num_speculative_tokens": MAX_LENGTH + 1}, {"rule": "nonsense"}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            harness.configure(llm, **changes)
    harness.take_rounds(llm)
    outputs = harness.generate(llm, PROMPTS[:2], max_tokens=8, ignore_eos=True)
    assert any(harness.rounds_of(outputs, harness.take_rounds(llm)))


def test_warm_up_runs_one_draft_pass(llm, monkeypatch):
    """vLLM's own would run one pass for each of K_max candidates, all of the same shape."""
    drafter = harness.proposer(llm)
    bound, model = drafter.num_speculative_tokens, drafter.model
    passes: list[int] = []

    def count(**inputs: Any) -> Any:
        passes.append(len(inputs["positions"]))
        return model(**inputs)

    monkeypatch.setattr(drafter, "model", count)
    drafter.dummy_run(4)
    assert passes == [4]
    assert drafter.num_speculative_tokens == bound > 1
