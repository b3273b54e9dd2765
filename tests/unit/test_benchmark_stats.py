# SPDX-License-Identifier: Apache-2.0
"""From raw rows to cells: rates, bootstrap intervals, ratios."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.common.stats import aggregate, rate, rate_ratio
from tests.benchmark_rows import METHODS, all_rows, raw_row


def test_rate_is_total_tokens_over_total_seconds() -> None:
    assert rate(np.array([100.0, 10.0]), np.array([10.0, 10.0])).value == pytest.approx(5.5)
    assert rate(np.array([100.0, 10.0]), np.array([10.0, 2.0])).value == pytest.approx(110 / 12)


def test_bootstrap_interval_of_the_mean_of_known_numbers() -> None:
    """With equal seconds the rate is a mean: its 95 % interval is close to mean ± 1.96 sd/sqrt(n)."""
    tokens = np.random.default_rng(1).normal(100.0, 10.0, size=400)
    spread = rate(tokens, np.ones(400))
    half = 1.96 * tokens.std() / 20
    # 4000 resamples put the ends within about 5 % of the half-width; 15 % leaves room.
    assert spread.low == pytest.approx(tokens.mean() - half, abs=0.15 * half)
    assert spread.high == pytest.approx(tokens.mean() + half, abs=0.15 * half)


def test_a_paired_ratio_does_not_spread_with_the_prompts() -> None:
    """Prompts differ by a factor of five, the ratio is 2 on each of them: the pairing must leave no spread."""
    seconds = np.linspace(1.0, 5.0, 20)
    tokens = np.full(20, 100.0)
    spread = rate_ratio(tokens, seconds, tokens, 2 * seconds)
    assert (spread.value, spread.low, spread.high) == pytest.approx((2.0, 2.0, 2.0))
    assert rate(tokens, seconds).high - rate(tokens, seconds).low > 1.0


def test_aggregate_known_numbers() -> None:
    cells = {(cell.set, cell.method): cell for cell in aggregate(all_rows(), METHODS)}
    assert {name for name, _ in cells} == {"a", "b", "all"}
    ours = cells["all", "confidence"]
    assert ours.units == 6
    assert ours.tokens_per_second.value == pytest.approx(12.5)
    assert ours.mean_candidate_length == pytest.approx(4.0)
    assert ours.acceptance == pytest.approx(0.75)
    assert ours.over_off is not None and ours.over_off.value == pytest.approx(2.5)
    assert ours.over_best_fixed_k is not None and ours.over_best_fixed_k.value == pytest.approx(1.25)
    assert ours.best_fixed_k == 4
    assert ours.equal_outputs == 6
    off = cells["a", "off"]
    assert (off.mean_candidate_length, off.acceptance, off.equal_outputs) == (None, None, None)


def test_best_fixed_k_is_chosen_for_each_set() -> None:
    rows = [r | {"seconds": 5.0} if (r["set"], r["method"]) == ("b", "draft_model:K=2") else r for r in all_rows()]
    best = {cell.set: cell.best_fixed_k for cell in aggregate(rows, METHODS)}
    assert (best["a"], best["b"]) == (4, 2)


def test_an_unfinished_prompt_is_left_out_for_every_method() -> None:
    rows = [*all_rows(), raw_row("a-9", "off", seconds=1000.0)]
    cells = {(cell.set, cell.method): cell for cell in aggregate(rows, METHODS)}
    assert cells["a", "off"].units == 3
    assert cells["a", "off"].tokens_per_second.value == pytest.approx(5.0)
    with pytest.raises(ValueError, match="no prompt was finished"):
        aggregate(rows[-1:], METHODS)


def test_equality_is_judged_by_hash_even_where_off_ran_last() -> None:
    rows = all_rows()
    rows = [r | {"output": "other"} if (r["prompt"], r["method"]) == ("a-1", "confidence") else r for r in rows]
    cells = {(cell.set, cell.method): cell for cell in aggregate(rows, METHODS)}
    assert cells["a", "confidence"].equal_outputs == 2
    assert cells["b", "confidence"].equal_outputs == 3
