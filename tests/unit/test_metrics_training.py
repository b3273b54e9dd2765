# SPDX-License-Identifier: Apache-2.0
"""Metrics against brute force, and calibrations against what was planted."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vllm_specdecpp.training import statistics as metrics
from vllm_specdecpp.training.fit import calibration


def brute_force_auc(scores: list[float], accepted: list[int]) -> float:
    """Count pairs of an accepted and a rejected row, ties half."""
    wins = 0.0
    pairs = 0
    for score, label in zip(scores, accepted, strict=True):
        for other, other_label in zip(scores, accepted, strict=True):
            if label == 1 and other_label == 0:
                pairs += 1
                wins += 1.0 if score > other else 0.5 if score == other else 0.0
    return wins / pairs


def bernoulli(p: Tensor, seed: int = 0) -> Tensor:
    return torch.bernoulli(p.double(), generator=torch.Generator().manual_seed(seed))


def normal(num: int, seed: int = 1) -> Tensor:
    return torch.randn(num, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("num_values", [2, 5, 1000], ids=["many ties", "ties", "few ties"])
@pytest.mark.parametrize("num_rows", [3, 64, 257])
def test_auc_counts_pairs(num_rows: int, num_values: int) -> None:
    generator = torch.Generator().manual_seed(num_rows + num_values)
    scores = torch.randint(num_values, (num_rows,), generator=generator) / num_values
    accepted = torch.randint(2, (num_rows,), generator=generator)
    accepted[:2] = torch.tensor([0, 1])
    expected = brute_force_auc(scores.tolist(), accepted.tolist())
    assert metrics.auc(scores, accepted.float()) == pytest.approx(expected, abs=1e-12)


def test_auc_of_one_class_is_unknown_and_of_infinities_is_not() -> None:
    assert math.isnan(metrics.auc(torch.tensor([0.1, 0.9]), torch.ones(2)))
    assert math.isnan(metrics.auc(torch.tensor([0.3]), torch.zeros(1)))
    assert metrics.auc(torch.tensor([-math.inf, 0.0, math.inf]), torch.tensor([0.0, 1.0, 1.0])) == 1.0


def test_ece_by_hand() -> None:
    # Two bins: estimates 0.1, 0.3 with rate 1/2 (gap 0.3); estimates 0.9, 1.0, 0.8 with rate 2/3 (gap 0.9 - 2/3).
    probability = torch.tensor([0.1, 0.3, 0.9, 1.0, 0.8])
    accepted = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0])
    assert metrics.ece(probability, accepted, bins=2) == pytest.approx(0.4 * 0.3 + 0.6 * (0.9 - 2 / 3), abs=1e-6)
    curve = metrics.reliability(probability, accepted, bins=4)
    assert curve.num.tolist() == [1, 1, 0, 3]
    assert curve.accept_rate[2].isnan() and curve.probability[2].isnan()  # empty
    assert curve.accept_rate[3].item() == pytest.approx(2 / 3)


def test_ece_by_chance_is_that_of_a_perfect_estimate() -> None:
    generator = torch.Generator().manual_seed(9)
    p = torch.rand(2000, generator=generator)
    found = sum(metrics.ece(p, torch.bernoulli(p, generator=generator)) for _ in range(60)) / 60
    assert metrics.chance_ece(p, seed=0) == pytest.approx(found, rel=0.08)
    assert metrics.chance_ece(p[:200], seed=0) > 2 * found  # fewer rows, more chance
    assert metrics.chance_ece((p > 0.5).double(), seed=0) == 0


def test_an_edge_belongs_to_the_bin_above_it() -> None:
    assert metrics.reliability(torch.tensor([0.0, 0.5, 1.0]), torch.ones(3), bins=2).num.tolist() == [1, 2]


def test_log_loss_and_brier_by_hand() -> None:
    probability, accepted = torch.tensor([0.8, 0.25]), torch.tensor([1.0, 0.0])
    assert metrics.log_loss(probability, accepted) == pytest.approx(-(math.log(0.8) + math.log(0.75)) / 2, rel=1e-6)
    assert metrics.brier(probability, accepted) == pytest.approx((0.04 + 0.0625) / 2, rel=1e-6)


def test_log_loss_of_a_sure_mistake_is_finite() -> None:
    assert metrics.log_loss(torch.tensor([1.0]), torch.zeros(1)) == pytest.approx(-math.log(metrics.EPSILON), rel=1e-6)


def test_a_replicate_is_the_metric_of_the_drawn_prompts() -> None:
    p = torch.rand(60, generator=torch.Generator().manual_seed(3)).double().mul(8).round() / 8
    accepted, prompt = bernoulli(p), torch.arange(60) % 7 * 10
    found = metrics.resample(p, accepted, prompt, resamples=4, seed=5)
    generator = torch.Generator().manual_seed(5)
    for replicate in range(4):
        drawn = torch.randint(7, (7,), generator=generator) * 10
        rows = torch.cat([torch.nonzero(prompt == each)[:, 0] for each in drawn])
        assert found.auc[replicate].item() == pytest.approx(metrics.auc(p[rows], accepted[rows]), abs=1e-12)
        assert found.log_loss[replicate].item() == pytest.approx(metrics.log_loss(p[rows], accepted[rows]), abs=1e-12)


def test_the_bootstrap_knows_that_rows_of_a_prompt_go_together() -> None:
    # 20 prompts of 100 rows, each prompt all alike: 2,000 rows tell as much as 20.
    accepted = bernoulli(torch.full((20,), 0.7)).repeat_interleave(100)
    p = torch.full((2000,), 0.7)
    together = metrics.resample(p, accepted, torch.arange(20).repeat_interleave(100))
    apart = metrics.resample(p, accepted, torch.arange(2000))
    assert together.log_loss.std() > 5 * apart.log_loss.std()


def test_interval_leaves_out_replicates_of_one_class() -> None:
    values = torch.cat([torch.linspace(0, 1, 101, dtype=torch.float64), torch.tensor([math.nan] * 50)])
    assert metrics.interval(values) == pytest.approx((0.025, 0.975))
    assert all(map(math.isnan, metrics.interval(torch.tensor([math.nan]))))


@pytest.mark.parametrize("slope", [0.4, 1.7])
def test_calibration_recovers_what_was_planted(slope: float) -> None:
    intercepts = torch.tensor([0.8, 0.1, -0.6, -1.0], dtype=torch.float64)
    logit = 2 * normal(60_000)
    position = torch.arange(60_000) % 4 + 1
    accepted = bernoulli((slope * logit + intercepts[position - 1]).sigmoid())
    found = calibration.fit_calibration(logit, accepted, position)
    assert found.slope == pytest.approx(slope, abs=0.05)
    assert found.intercepts == pytest.approx(intercepts.tolist(), abs=0.08)


def test_calibration_undoes_w_rej() -> None:
    # A head trained with w_rej = 6 has its optimum at p / (p + 6 (1 - p)).
    p = (1.5 + 1.5 * normal(40_000)).sigmoid()
    accepted, position = bernoulli(p), torch.arange(40_000) % 3 + 1
    logit = (p / (p + 6 * (1 - p))).logit()
    fit, held_out = slice(0, 20_000), slice(20_000, None)
    assert metrics.ece(logit[held_out].sigmoid(), accepted[held_out]) > 0.2
    shift = calibration.shift_of({"w_rej": 6})
    found = calibration.fit_calibration(logit[fit], accepted[fit], position[fit], shift=shift)
    assert found.intercepts == pytest.approx([math.log(6)] * 3, abs=0.1)
    assert metrics.ece(found.probability(logit[held_out], position[held_out]), accepted[held_out]) < 0.02


@pytest.mark.parametrize("label", [None, 0.0, 1.0], ids=["soft", "all rejected", "all accepted"])
def test_one_row_stays_near_the_shift(label: float | None) -> None:
    accepted = torch.tensor([0.5 if label is None else label])
    found = calibration.fit_calibration(torch.tensor([0.0]), accepted, torch.tensor([3]), shift=math.log(6))
    assert found.slope == pytest.approx(1.0, abs=1e-6) and len(found.intercepts) == 1
    assert math.isfinite(found.intercepts[0])
    if label == 1.0:  # p = 6/7 was expected, so an acceptance says little
        assert math.log(6) < found.intercepts[0] < math.log(6) + 4


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_labels_that_are_all_alike_give_a_finite_calibration(label: float) -> None:
    found = calibration.fit_calibration(normal(5000), torch.full((5000,), label), torch.ones(5000, dtype=torch.long))
    p = found.probability(normal(5000), torch.ones(5000))
    assert math.isfinite(found.slope) and 0.98 < (p if label else 1 - p).min() < 1


def test_scores_that_separate_the_labels_do_not_run_away() -> None:
    logit = torch.linspace(-3, 3, 2000)
    found = calibration.fit_calibration(logit, (logit > 0).double(), torch.ones(2000, dtype=torch.long))
    assert 2 < found.slope < 100
    huge = calibration.fit_calibration(1e4 * logit, (logit > 0).double(), torch.ones(2000, dtype=torch.long))
    assert math.isfinite(huge.slope)


def test_a_rare_position_is_drawn_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    # Position 2 has 100 rows, of which fewer than the score says are accepted; its own fit would be ln(1/9).
    position = torch.cat([torch.ones(20_000), torch.full((100,), 2.0)]).long()
    accepted = torch.cat([torch.arange(20_000) % 2, (torch.arange(100) % 10 == 0).long()]).double()
    logit = torch.zeros(20_100)

    def at_two(precision: float) -> float:
        monkeypatch.setattr(calibration, "POSITION_PRECISION", precision)
        return calibration.fit_calibration(logit, accepted, position).intercepts[1]

    held, free = at_two(calibration.POSITION_PRECISION), at_two(1e-9)
    assert free == pytest.approx(math.log(1 / 9), abs=0.01)
    assert free + 0.3 < held < -0.3
    assert at_two(1e9) == pytest.approx(0.0, abs=0.05)


def test_positions_beyond_the_last_with_enough_rows_share_its_intercept() -> None:
    position = torch.tensor([1, 2, 3, 9]).repeat_interleave(torch.tensor([500, 150, 60, 30]))
    found = calibration.fit_calibration(normal(740), bernoulli(torch.full((740,), 0.6)), position)
    assert len(found.intercepts) == 2  # 90 rows from position 3 on
    same = found.probability(torch.zeros(3), torch.tensor([2, 3, 40]))
    assert same[0] == same[1] == same[2]


def test_row_weights_count_as_repeats() -> None:
    inputs = normal(400)[:, None]
    accepted, times = bernoulli(inputs[:, 0].sigmoid()), torch.arange(400) % 3
    weighted = calibration.fit_regression(inputs, accepted, weights=times.double(), precision=1e-9)
    rows = torch.arange(400).repeat_interleave(times)
    repeated = calibration.fit_regression(inputs[rows], accepted[rows], precision=1e-9)
    assert weighted.coefficients.tolist() == pytest.approx(repeated.coefficients.tolist(), abs=1e-3)
    assert weighted.intercept == pytest.approx(repeated.intercept, abs=1e-3)


def test_the_fit_is_the_same_bits_again() -> None:
    logit, position = normal(3000), torch.arange(3000) % 5 + 1
    accepted = bernoulli(logit.sigmoid())
    first = calibration.fit_calibration(logit, accepted, position)
    assert first == calibration.fit_calibration(logit, accepted, position)


def test_regression_recovers_its_coefficients_whatever_the_inputs_scale() -> None:
    inputs = torch.stack([100 + 50 * normal(50_000, 4), 0.01 * normal(50_000, 5), torch.ones(50_000)], dim=1)
    logit = -3 + 0.02 * inputs[:, 0] + 80 * inputs[:, 1]
    found = calibration.fit_regression(inputs, bernoulli(logit.sigmoid()))
    assert found.coefficients[:2].tolist() == pytest.approx([0.02, 80], rel=0.05)
    assert found.coefficients[2] == 0.0  # a constant input says nothing
    assert (found.logit(inputs) - logit).abs().mean() < 0.05


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_fit_refuses_scores_that_are_no_numbers(bad: float) -> None:
    with pytest.raises(ValueError, match="^specdecpp: 1 of 2 scores are no finite numbers"):
        calibration.fit_calibration(torch.tensor([0.0, bad]), torch.ones(2), torch.ones(2, dtype=torch.long))


@pytest.mark.parametrize("w_rej", [0, -1.0, math.nan, math.inf, "6", True, None])
def test_a_w_rej_that_is_no_weight_is_refused(w_rej: object) -> None:
    with pytest.raises(ValueError, match="w_rej=.* must be a number above 0"):
        calibration.shift_of({"w_rej": w_rej})


def test_log_odds_saturate() -> None:
    assert calibration.log_odds(torch.tensor([0.0, 0.5, 1.0])).tolist() == [-12.0, 0.0, 12.0]
