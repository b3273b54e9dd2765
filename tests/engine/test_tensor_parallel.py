# SPDX-License-Identifier: Apache-2.0
"""Two CPU ranks that see different numbers decide alike; without rank 0's word they come apart."""

from __future__ import annotations

import pytest

from tests import ranks
from tests.engine.two_ranks import MAX_LENGTH, MAX_TOKENS, PROMPTS, THRESHOLD
from tests.reference_loop import Rule, answer

RUN_SECONDS = 30
"""How long ranks that wait for each other are watched."""
MODULE = "tests.engine.two_ranks"


@pytest.fixture(scope="module")
def by_request(reference):
    """The rounds of rank 0's draft, which is not the noisy one, under the rule ``confidence``."""
    rule = Rule("confidence", THRESHOLD, max_length=MAX_LENGTH)
    return ranks.reference(reference("target"), reference("draft_good"), PROMPTS, rule, MAX_TOKENS)


def test_ranks_with_different_numbers_decide_alike(reference, by_request, tmp_path):
    found = ranks.run(MODULE, tmp_path, alone=False)
    assert found is not None
    expected = [answer(reference("target"), prompt, MAX_TOKENS) for prompt in PROMPTS]
    for rule, result in found.items():
        assert result["tokens"] == expected, rule
        first, second = result["rounds"]
        assert first == second and len(first) > 30, rule
    assert len({len(r["candidates"]) for r in found["confidence"]["rounds"][0]}) >= 4
    assert found["confidence"]["by_request"] == by_request


@pytest.mark.slow
def test_ranks_that_do_not_agree_come_apart(tmp_path):
    """The test's power: with the same noise, and each rank left to itself, they hang or differ."""
    found = ranks.run(MODULE, tmp_path, alone=True, seconds=RUN_SECONDS)
    assert found is None or any(r["rounds"][0] != r["rounds"][1] for r in found.values())
