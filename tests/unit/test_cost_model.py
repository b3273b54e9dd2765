# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from vllm_specdecpp.costs.curves import Curve
from vllm_specdecpp.costs.model import CostModel, suggested_widths

CPU = {1: 0.136, 2: 0.145, 3: 0.112, 6: 0.109, 9: 0.150, 17: 0.199}


def test_a_width_that_cost_more_than_a_wider_one_is_believed_once_real_steps_say_so():
    """At start-up it may have been a slow moment: drafts must not be kept away from that width for good."""
    curve = Curve(CPU, 40)
    assert [curve.at(w) for w in (*CPU, 4)] == pytest.approx([0.109, 0.109, 0.109, 0.109, 0.150, 0.199, 0.109])
    for _ in range(30):
        for width, seconds in CPU.items():
            curve.observe(width, seconds)
    assert [curve.at(w) for w in CPU] == pytest.approx(list(CPU.values()), rel=0.02)


def test_a_hill_that_was_measured_outlives_a_start():
    """Real steps at its top then find the curve as it is, and no new level of all widths."""
    curve = Curve(Curve({1: 0.020, 2: 0.040, 3: 0.038, 4: 0.022, 8: 0.024}, 16).points(), 16).raised(0.002)
    for _ in range(30):
        curve.observe(2, 0.042)
    assert [curve.at(w) for w in (1, 2, 4, 8)] == pytest.approx([0.022, 0.042, 0.024, 0.026], rel=0.05)


@pytest.mark.parametrize("rounds", [[], [1]])
def test_a_slow_spell_of_passes_that_nobody_runs_since_is_forgotten(rounds):
    """It would else be believed for ever: what is too dear is not drafted, and shows no time."""
    costs = CostModel({1: 0.006}, {1: 0.004}, {1: 0.02})
    for _ in range(20):
        costs.observe_draft([1, 1, 1], 9.0)
        costs.verify.observe(1, 0.02)
    assert costs.step.at(1) > 0.5
    for _ in range(3000):
        costs.observe_draft(rounds, 0.006 * len(rounds))
        costs.verify.observe(1, 0.02)
    assert costs.draft_seconds([1, 1]) == pytest.approx(0.010, rel=0.1)


def test_a_slow_spell_that_put_an_end_to_drafting_is_not_the_next_starts_curve():
    costs = CostModel({1: 0.006}, {1: 0.004}, {1: 0.02})
    for rounds, seconds, now, kept in ((14, 9.0, 3.0, 0.010), (400, 0.028, 0.020, 0.020)):  # the latter lasts
        for _ in range(rounds):
            costs.observe_draft([1, 1, 1], seconds)
        assert costs.draft_seconds([1, 1]) > 0.9 * now
        kept_points: dict[str, Any] = dict(costs.points(lasting=True))
        assert CostModel(**kept_points).draft_seconds([1, 1]) == pytest.approx(kept, rel=0.1)


def test_where_every_round_reads_no_curve_runs_away():
    """The first pass was measured a tenth too dear: rounds that read must put it right, and not reading."""
    costs = CostModel({1: 0.006}, {1: 0.004}, {1: 0.02}, {1: 0.004, 2: 0.004, 1024: 0.2})
    for _ in range(3000):
        costs.observe_draft([1], 0.0054, [3])
    assert costs.read_seconds(1024) > 0.15 and costs.draft_seconds([1]) == pytest.approx(0.0054, rel=0.1)


def test_goes_on_beyond_what_was_measured():
    curve = Curve(CPU, 40)
    slope = (0.199 - 0.109) / (17 - 6)  # of the upper half, not of the last two points
    assert curve.at(40) == pytest.approx(0.199 + 23 * slope)
    assert curve.at(50) == pytest.approx(0.199 + 33 * slope)
    assert Curve({3: 0.1}, 8).at(8) == Curve({3: 0.1}, 8).at(1) == pytest.approx(0.1)


@pytest.mark.parametrize("points", [{}, {0: 1.0}, {1: 0.0}, {1: float("nan")}, {1: -1.0}, {2: float("inf")}])
def test_refuses_times_that_are_none(points):
    with pytest.raises(ValueError, match="^specdecpp: .*measure"):
        Curve(points, 8)


def test_follows_real_steps_and_ignores_bursts():
    rng = random.Random(0)
    curve = Curve(CPU, 32)
    for i in range(120):
        curve.observe(4, 0.14 * rng.lognormvariate(0, 0.05))
        if i % 20 == 0:
            assert not curve.observe(4, 3.0)  # compilation
    assert curve.at(4) == pytest.approx(0.14, rel=0.03)
    # A width never seen takes part in the drift, most of it.
    assert curve.at(17) == pytest.approx(0.199 * 0.14 / 0.111, rel=0.08)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        assert not curve.observe(4, bad)
    assert not curve.observe(0, 0.1) and not curve.observe(999, 0.1)


def test_a_lasting_change_of_level_is_no_outlier():
    curve = Curve(CPU, 32)
    for _ in range(20):
        curve.observe(4, 0.5)
    assert curve.at(4) == pytest.approx(0.5, rel=0.05)


def test_a_burst_of_another_process_is_no_new_level():
    curve = Curve(CPU, 32)
    for i in range(300):
        curve.observe(4, 0.111 * (2.2 if i % 50 < 8 else 1.0))
        assert curve.at(4) == pytest.approx(0.111, rel=0.02)


def test_a_width_that_is_seen_now_and_then_is_put_right_alone():
    curve = Curve(CPU, 32)
    for i in range(60):
        curve.observe(2, 0.145)
        if i % 6 == 0:
            curve.observe(5, 0.4)
    assert 0.25 < curve.at(5) < 0.42 and curve.at(2) == pytest.approx(0.145, rel=0.05)


def test_after_a_change_of_all_no_width_stays_behind():
    curve = Curve(CPU, 32)
    for factor in (0.01, 1.0):  # a clock in other units, and back
        for i in range(100):
            width = (2, 3, 4, 5)[i % 4]
            curve.observe(width, factor * CPU.get(width, 0.11))
    assert curve.at(5) == pytest.approx(0.11, rel=0.05) and curve.at(9) == pytest.approx(0.15, rel=0.15)


def test_wide_steps_learn_from_their_neighbours_and_narrow_ones_do_not():
    curve = Curve({1: 0.1, 100: 0.2}, 128)
    for _ in range(30):
        curve.observe(2, 0.08)
        curve.observe(3, 0.13)
        curve.observe(96, 0.25)
    assert curve.at(2) == pytest.approx(0.08, rel=0.03) and curve.at(3) == pytest.approx(0.13, rel=0.03)
    assert curve.at(99) == pytest.approx(0.25, rel=0.06)


def test_the_price_of_a_row_survives_noisy_steps():
    rng = np.random.default_rng(0)
    start = {w: (0.02 + 0.0006 * w) * float(np.exp(rng.normal(0, 0.03))) for w in suggested_widths(1088)}
    curve = Curve(start, 1088)
    for _ in range(300):
        width = int(rng.integers(80, 240))
        curve.observe(width, (0.02 + 0.0006 * width) * float(np.exp(rng.normal(0, 0.05))))
    rows = np.diff(curve.many(np.arange(96, 225, 16))) / 16
    assert rows == pytest.approx(np.full(8, 0.0006), rel=0.35)
    assert rows.mean() == pytest.approx(0.0006, rel=0.08)
    steps = np.diff(curve.table()[96:225])
    assert np.abs(steps - 0.0006).max() < 0.0006  # no cliffs between bins


def test_what_neighbours_have_of_each_other_is_kept_up_to_date():
    rng = np.random.default_rng(1)
    curve = Curve(CPU, 200)
    for i in range(4000):
        width, seconds = int(rng.integers(1, 200)), float(rng.lognormal(-2, 0.2)) * (30 if 200 < i < 215 else 1)
        curve.observe(width, seconds)
    own, nearby = curve._state
    assert nearby == pytest.approx(own @ curve._near, rel=1e-6, abs=1e-6)
    assert curve.many(np.array([[1, 30], [200, 260]])).tolist() == [
        [curve.at(1), curve.at(30)], [curve.at(200), pytest.approx(curve.at(260))],
    ]  # fmt: skip


def test_no_time_is_too_strange():
    curve = Curve(CPU, 32)
    for seconds in [1e300] * 12 + [1e-300] * 12:
        curve.observe(5, seconds)
        assert (np.isfinite(curve.table()[1:]) & (curve.table()[1:] > 0)).all()
    for i in range(200):  # ever further off, each time just short of an outlier
        curve.nudge(3, 6 * 0.05 * 1.1 ** min(i, 60))
    assert not curve.nudge(3, 2.0)
    assert not curve.nudge(3, float("nan")) and not curve.nudge(33, 0.1) and not curve.nudge(0, 0.1)
    for _ in range(200):
        curve.observe(5, 0.12)
    assert curve.at(5) == pytest.approx(0.12, rel=0.05)


def test_a_machine_that_slows_down_slows_down_what_nobody_runs_too():
    """Drafting goes on through a slow spell and behind it: what nobody ran must not look as dear as in the spell."""
    costs = CostModel({1: 0.04}, {1: 0.02}, {1: 0.1, 4: 0.12, 8: 0.15})
    for factor, rounds, width in ((1.0, 60, 1), (1.5, 20, 1), (1.0, 20, 4)):
        for _ in range(rounds):
            costs.observe_draft([1, 1, 1], factor * 0.08)
            costs.verify.observe(width, factor * {1: 0.1, 4: 0.12}[width])
        found = [costs.verify.at(1), costs.verify.at(4), costs.verify.at(8), costs.draft_seconds([1])]
        assert found == pytest.approx([factor * x for x in (0.1, 0.12, 0.15, 0.04)], rel=0.08)


def test_the_next_start_is_told_little_of_the_pace():
    costs = CostModel({1: 0.04}, {1: 0.02}, {1: 0.1})
    for _ in range(40):
        costs.observe_draft([1, 1, 1], 0.16)
        costs.verify.observe(1, 0.2)
    assert costs.points()["verify"][1] == pytest.approx(0.2, rel=0.05)
    assert 0.1 <= costs.points(lasting=True)["verify"][1] < 0.13


def test_rounds_of_each_length():
    costs = CostModel({1: 0.04, 2: 0.06}, {1: 0.02, 2: 0.03}, {1: 0.1, 10: 0.19}, max_reqs=2, max_tokens=10)
    expected = [costs.round_seconds([], 2), costs.round_seconds([2], 4), costs.round_seconds([2, 2], 6)]
    assert costs.fixed_seconds(2, 2) == pytest.approx(expected)


def test_draft_phase_time_goes_to_the_passes_by_share():
    costs = CostModel({1: 0.04}, {1: 0.02}, {1: 0.1}, max_reqs=1)
    for _ in range(200):
        costs.observe_draft([1, 1, 1, 1], 0.15)
        costs.observe_draft([1], 0.06)
    assert costs.draft_seconds([1]) == pytest.approx(0.06, rel=0.05)
    assert costs.draft_seconds([1, 1, 1, 1]) == pytest.approx(0.15, rel=0.05)
    assert costs.draft_seconds([]) == 0
    costs.observe_draft([], 0.0)  # a round without drafting


def test_reading_is_a_curve_of_its_own():
    costs = CostModel({1: 0.04}, {1: 0.04}, {1: 0.1}, {1: 0.03, 16: 0.04, 256: 0.28})
    assert [costs.read_seconds(n) for n in (0, 1, 16, 136, 256)] == pytest.approx([0, 0.03, 0.04, 0.16, 0.28])
    assert costs.read_seconds(3000) == pytest.approx(0.28 + 2744 * (0.28 - 0.04) / 240)
    for _ in range(30):
        costs.observe_draft([], 0.24, [136])
        costs.verify.observe(1, 0.1)
    assert costs.read_seconds(136) == pytest.approx(0.24, rel=0.03)
    assert costs.read_seconds(1000) > 1.3 * (0.28 + 744 * 0.001)  # most of it is true of other prompts
    assert costs.draft_seconds([1, 1]) == pytest.approx(0.08, rel=0.2) and costs.verify.at(1) == pytest.approx(0.1, 0.1)


def test_what_a_prompt_took_beyond_a_usual_draft_phase_was_reading():
    """First passes: 30 ms for two tokens and 10 ms for the lm_head; reading 136 tokens really takes 240 ms."""
    for widths, rest in (([1, 1, 1], 0.01 + 2 * 0.02), ([], 0.0)):
        costs = CostModel({1: 0.04}, {1: 0.02}, {1: 0.1}, {1: 0.03, 2: 0.03, 16: 0.04, 256: 0.28})
        for _ in range(30):
            costs.observe_draft(widths, rest + 0.24, [136])
            costs.observe_draft([1, 1, 1], 0.08)
        assert costs.read_seconds(136) == pytest.approx(0.24, rel=0.05)
        assert costs.draft_seconds([1, 1, 1]) == pytest.approx(0.08, rel=0.05)


def test_several_passes_share_their_time_as_expected():
    costs = CostModel({1: 0.04}, {1: 0.02}, {1: 0.1}, {2: 0.03, 256: 0.3})
    for _ in range(30):
        costs.observe_draft([1], 0.01 + 1.3 * 0.33, [256, 2])
    assert [costs.read_seconds(n) for n in (2, 256)] == pytest.approx([1.3 * 0.03, 1.3 * 0.3], rel=0.05)


def test_reading_that_nobody_timed_is_in_proportion_to_the_target():
    costs = CostModel({1: 0.04}, {1: 0.02}, {1: 0.1, 11: 0.2})
    assert costs.read_seconds(11) == pytest.approx(0.04)


def test_suggested_widths_cover_the_range():
    assert suggested_widths(1) == [1] and suggested_widths(9) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    widths = suggested_widths(1000)
    assert widths[-1] == 1000 and len(widths) < 30 and (np.diff(widths) > 0).all()
