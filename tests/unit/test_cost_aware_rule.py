# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy

import numpy as np
import pytest

from tests.standings import believed, standings
from vllm_specdecpp.costs.model import CostModel
from vllm_specdecpp.decision.cost_aware.drafting import CostAwareRound
from vllm_specdecpp.decision.cost_aware.rule import CostAwareRule

PAPER = ({1: 0.023, 64: 0.023}, {1: 0.023, 64: 0.023}, {1: 0.109, 1024: 0.109})


def paper_rule(**kwargs):
    return CostAwareRule(CostModel(*PAPER), 8, **kwargs)


def set_round(limit, price, step, verify):
    """A round of one request, whose candidates 2, 3, ... are accepted with probability 0.3 each, and 1 with 0.9."""
    costs = CostModel({1: step}, {1: step}, verify, max_reqs=1)
    rule = CostAwareRule(believed(costs), 8)
    rule.acceptance.this.theta = np.array([0.0, np.log(9)] + [0.0] * 8)
    rule.acceptance.next.theta = np.array([0.0, np.log(3 / 7)] + [0.0] * 8)
    return CostAwareRound(rule, ["a"], np.array([limit]), np.array([True]), price)


def test_a_cheaper_wider_verification_is_seen_over_a_hill():
    verify = {1: 0.136, 2: 0.145, 3: 0.30, 4: 0.107, 5: 0.107, 6: 0.2}
    for limit, goes_on in ((6, True), (2, False), (1, False)):  # 2 -> 3 loses, 2 -> 4 wins, where there is room
        round_ = set_round(limit, 8.0, 0.01, verify)
        round_.step(np.array([0.5]))
        assert round_.running.tolist() == [goes_on] and round_.lengths.tolist() == [1]


def test_a_request_that_was_easy_drafts_on_where_one_that_was_not_stops():
    rule = paper_rule()
    rule.admission.records.update(["easy", "hard"] * 20, [3] * 40, [3, 1] * 20)
    levels = rule.begin(standings(["easy", "hard", "new"], [8] * 3)).levels
    assert levels[0] > 1 > 0 > levels[1] and abs(levels[2]) < 0.5
    for level, goes_on in zip(levels, (True, False, False), strict=True):
        round_ = set_round(6, 8.0, 0.08, {1: 0.1, 9: 0.11})
        round_.rule.acceptance.next.theta[:2] = 0.3, 0.3
        round_.levels[:] = level
        round_.step(np.array([0.5]))
        assert round_.running.tolist() == [goes_on]


def test_a_last_look_that_is_not_worth_its_row_is_dropped():
    for row, submits in ((0.001, True), (0.0014, True), (0.0016, False)):
        round_ = set_round(1, 600.0, 0.01, {1: 0.02, 9: 0.02 + 8 * row})
        round_.step(np.array([0.5]))
        assert round_.lengths.tolist() == [submits]  # 0.9 tokens for 600 * row


def test_stops_early_on_low_scores_and_late_on_high_ones():
    rule = paper_rule()
    lengths = []
    for score in (0.1, 0.4, 0.99):
        round_ = rule.begin(standings(["a"], [8]))
        while round_.running.any():
            round_.step(np.array([score]))
        lengths.append(int(round_.lengths[0]))
    assert lengths[0] <= 2 and lengths[0] < lengths[1] < lengths[2] == 8


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("max_lengths", [[], [0], [0, 3, 1], [1, 1]])
def test_bounds_hold_for_odd_batches(lag, max_lengths):
    rule = paper_rule(lag=lag)
    for _ in range(5):
        round_ = rule.begin(standings([str(i) for i in range(len(max_lengths))], max_lengths))
        while round_.running.any():
            round_.step(np.full(len(max_lengths), np.nan))
        assert (round_.lengths <= np.array(max_lengths)).all()
        rule.finish(round_, round_.lengths.tolist(), round_.lengths.tolist(), 0.05, 0.1)
    assert np.isfinite(rule.admission.price)


def test_nan_scores_fall_back_on_the_mean_acceptance():
    rule, rng = paper_rule(), np.random.default_rng(0)
    lengths = []
    for _ in range(300):
        round_ = rule.begin(standings(["a"], [8]))
        while round_.running.any():
            round_.step(np.array([np.nan]))
        length = int(round_.lengths[0])
        wins = int(np.argmin(np.append(rng.random(length) < 0.9, False)))
        rule.finish(round_, [length], [wins], 0.023 * len(round_.widths), 0.109)
        lengths.append(length)
    assert 3 <= np.median(lengths[100:]) <= 7  # the best K is 5


def test_the_future_changes_no_decision():
    rng = np.random.default_rng(4)
    rows_cost = {1: 0.023, 64: 0.2}, {1: 0.023, 64: 0.2}, {1: 0.109, 1024: 4.0}  # so requests are told apart
    rule = CostAwareRule(CostModel(*rows_cost), 8)
    decided = set()
    for _ in range(40):
        scores, other = rng.beta(4, 1, (8, 3)), rng.beta(4, 1, (8, 3))
        # Candidate k + 1 is decided at step k: with the scores up to k alike, all decisions so far are alike.
        for k in range(1, 4):
            one, two = rule_pair(rule)
            rounds = [r.begin(standings(["a", "b", "c"], [8, 8, 8])) for r in (one, two)]
            for step in range(8):
                if not all(r.running.any() for r in rounds):
                    break
                rows = (scores[step], scores[step] if step < k else other[step])
                for round_, row in zip(rounds, rows, strict=True):
                    round_.step(row)
                if step < k:
                    for name in ("lengths", "running"):
                        assert (getattr(rounds[0], name) == getattr(rounds[1], name)).all()
                    decided.add(tuple(rounds[0].running))
        serve(rule, scores, rng)
    assert len(decided) >= 3  # the rule did decide


def rule_pair(rule):
    return copy.deepcopy(rule), copy.deepcopy(rule)


def serve(rule, scores, rng):
    round_ = rule.begin(standings(["a", "b", "c"], [8, 8, 8]))
    while round_.running.any():
        round_.step(scores[len(round_.widths)])
    accepted = rng.random(scores.shape) < scores
    wins = [int(np.argmin(np.append(accepted[:n, i], False))) for i, n in enumerate(round_.lengths)]
    rule.finish(round_, round_.lengths.tolist(), wins, 0.023 * len(round_.widths), 0.109)


def test_draft_that_is_never_accepted_is_switched_off_and_found_again():
    rule, rng = paper_rule(), np.random.default_rng(5)

    def rounds(num, accept):
        drafted, spent, emitted = 0, 0.0, 0
        for _ in range(num):
            round_ = rule.begin(standings(["a"], [8]))
            while round_.running.any():
                round_.step(np.array([0.9]))
            length = int(round_.lengths[0])
            wins = int(np.argmin(np.append(rng.random(length) < accept, False)))
            rule.finish(round_, [length], [wins], 0.023 * len(round_.widths), 0.109)
            drafted += length > 0
            spent, emitted = spent + 0.023 * len(round_.widths) + 0.109, emitted + wins + 1
        return drafted, emitted / spent

    rounds(300, 0.02)
    drafted, rate = rounds(500, 0.02)
    assert drafted < 25 and rate > 0.99 / 0.109
    rounds(250, 0.9)
    drafted, rate = rounds(100, 0.9)
    assert drafted > 95 and rate > 2 / 0.109


def test_one_bad_request_in_a_batch_rides_without_drafting():
    verify = {1: 0.02, 256: 0.02 + 255 * 0.003}  # rows cost
    rule = CostAwareRule(CostModel({1: 0.003}, {1: 0.003}, verify, max_reqs=8), 4)
    rng, drafted = np.random.default_rng(6), np.zeros(4)
    for turn in range(400):
        round_ = rule.begin(standings(list("abcd"), [4] * 4))
        while round_.running.any():
            round_.step(np.full(4, np.nan))
        accept = np.array([0.95, 0.95, 0.95, 0.02])
        wins = [
            int(np.argmin(np.append(rng.random(n) < p, False))) for n, p in zip(round_.lengths, accept, strict=True)
        ]
        rule.finish(round_, round_.lengths.tolist(), wins)
        drafted += (round_.lengths > 0) * (turn >= 200)
    assert drafted[:3].min() > 150 and drafted[3] < 40


def test_requests_are_forgotten_and_unknown_outcomes_taken():
    rule = paper_rule()
    rule.admission.records.max_requests = 10
    for i in range(50):
        round_ = rule.begin(standings([f"r{i}", f"s{i}"], [8, 8]))
        while round_.running.any():
            round_.step(np.array([0.9, 0.9]))
        rule.finish(round_, [None, int(round_.lengths[1])], [0, int(round_.lengths[1])])
    assert len(rule.admission.records._requests) <= 10
    assert rule.admission.price > 2 / 0.109


@pytest.mark.parametrize("lag", [0, 1])
def test_a_round_that_costs_nothing_drafts_to_the_limits(lag):
    rule = paper_rule(lag=lag)
    round_ = CostAwareRound(rule, ["a", "b", "c"], np.array([3, 8, 5]), np.array([True, True, False]), 0.0)
    while round_.running.any():
        round_.step(np.array([0.0, np.nan, 1.0]))
    assert round_.lengths.tolist() == [3, 8, 0] and round_.widths == [2, 2, 2, 1, 1, 1, 1, 1]


def test_a_length_below_one_is_refused():
    with pytest.raises(ValueError, match="^specdecpp: num_speculative_tokens=0"):
        CostAwareRule(CostModel(*PAPER), 0)
