# SPDX-License-Identifier: Apache-2.0
"""What the demo prints: rounds, the summary, where outputs part."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import demo
from benchmarks.common.engines import Generation
from benchmarks.common.methods import Method, parse_method
from benchmarks.serve.render import round_line


def test_round_line_shows_accepted_rejected_and_own_token() -> None:
    def decode(ids: Any) -> str:
        return "".join(chr(i) for i in ids)

    row = {"candidates": [ord(c) for c in "ab\nd"], "accepted": 2, "next_token": ord("x")}
    assert round_line(7, row, decode, colour=False) == "   7   2 of  4 accepted  |ab~\\nd~+x|"
    assert "\033[32mab\033[0m" in round_line(7, row, decode, colour=True)
    assert "~" not in round_line(1, {**row, "accepted": 4}, decode, colour=False)


def test_demo_summary_has_the_agreed_object() -> None:
    def answers(seconds: float, ids: list[int]) -> list[Generation]:
        return [Generation([ids], seconds, {"rounds": 2, "candidates": 7, "accepted": 5})] * 2

    results = {method: answers(1.0, [1, 2, 3, 4]) for method in demo.METHODS}
    results[Method("off")] = answers(2.0, [1, 2, 3, 4])
    results[parse_method("draft_model:6")] = answers(0.8, [1, 2, 3, 4])
    results[demo.OURS] = answers(0.5, [1, 2, 3, 4])
    table, last = demo.summary(results, 2)
    assert last == {
        "tokens_per_second": {"off": 2.0, "draft_model": 5.0, "specdecpp": 8.0},
        "best_fixed_k": 6,
        "mean_candidate_length": 3.5,
        "outputs_equal": True,
        "prompts": 2,
    }
    assert "specdecpp over the best fixed K: 1.60" in table
    results[demo.OURS] = answers(0.5, [1, 2, 3, 5])
    assert demo.summary(results, 2)[1]["outputs_equal"] is False


def test_demo_prompts_are_there() -> None:
    prompts = demo.load_prompts(6)
    assert {prompt["set"] for prompt in prompts} == {"code", "chat", "maths"}
    with pytest.raises(ValueError, match="choose 1 to 6"):
        demo.load_prompts(7)


def test_demo_says_where_outputs_part() -> None:
    assert demo.difference([1, 2, 3], [1, 2, 3]).startswith("same")
    assert "from token 3 on" in demo.difference([1, 2, 3], [1, 2, 4])
    assert "from token 3 on" in demo.difference([1, 2, 3], [1, 2])
