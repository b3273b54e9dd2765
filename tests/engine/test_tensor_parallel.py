# SPDX-License-Identifier: Apache-2.0
"""Two CPU ranks that see different numbers decide alike; without rank 0's word they come apart."""

from __future__ import annotations

from typing import Any

import pytest

from tests import ranks
from tests.engine import two_ranks
from tests.reference_loop import Rule, answer

RUN_SECONDS = 60
"""How long ranks that wait for each other are watched."""


@pytest.fixture(scope="module")
def played() -> Any:
    """The module that the ranks run."""
    return two_ranks


@pytest.fixture(scope="module")
def by_request(reference, played):
    """The rounds of rank 0's draft, which is not the noisy one, under the rule ``confidence``."""
    rule = Rule("confidence", played.THRESHOLD, max_length=played.MAX_LENGTH)
    return ranks.reference(reference("target"), reference("draft_good"), played.PROMPTS, rule, played.MAX_TOKENS)


def test_ranks_with_different_numbers_decide_alike(reference, played, by_request, tmp_path):
    found = ranks.run(played.__name__, tmp_path, alone=False)
    assert found is not None
    expected = [answer(reference("target"), prompt, played.MAX_TOKENS) for prompt in played.PROMPTS]
    for rule, result in found.items():
        assert result["tokens"] == expected, rule
        first, second = result["rounds"]
        assert first == second and len(first) >= 15, rule
        if rule in played.VARIED:
            assert len({len(r["candidates"]) for r in first}) >= 4, rule
            # Rank 0's draft, not the noisy one.
            assert sum(r["accepted"] for r in first) > 0.5 * sum(len(r["candidates"]) for r in first), rule
    assert found["confidence"]["by_request"] == by_request


@pytest.mark.slow
def test_ranks_that_do_not_agree_come_apart(played, tmp_path):
    """The test's power: with the same noise, and each rank left to itself, they hang or differ."""
    found = ranks.run(played.__name__, tmp_path, alone=True, seconds=RUN_SECONDS)
    assert found is None or any(r["rounds"][0] != r["rounds"][1] for r in found.values())
