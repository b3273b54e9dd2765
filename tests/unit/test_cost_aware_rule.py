# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy

import numpy as np
import pytest

from vllm_specdecpp.costs.model import CostModel
from vllm_specdecpp.decision.cost_aware.drafting import CostAwareRound
from vllm_specdecpp.decision.cost_aware.guard import Guard, fixed_tokens
from vllm_specdecpp.decision.cost_aware.rate import RateEstimate
from vllm_specdecpp.decision.cost_aware.rule import CostAwareRule
from vllm_specdecpp.decision.cost_aware.start import StartGate

PAPER = ({1: 0.023, 64: 0.023}, {1: 0.023, 64: 0.023}, {1: 0.109, 1024: 0.109})


def paper_rule(**kwargs):
    return CostAwareRule(CostModel(*PAPER), 8, **kwargs)


def set_round(limit, price, step, verify):
    """A round of one request, whose candidates 2, 3, ... are accepted with probability 0.3 each, and 1 with 0.9."""
    costs = CostModel({1: step}, {1: step}, verify, max_reqs=1)
    rule = CostAwareRule(costs, 8)
    rule.acceptance.this.theta = np.array([0.0, np.log(9)] + [0.0] * 8)
    rule.acceptance.next.theta = np.array([0.0, np.log(3 / 7)] + [0.0] * 8)
    return CostAwareRound(rule, ["a"], np.array([limit]), np.array([True]), price)


def test_a_cheaper_wider_verification_is_seen_over_a_hill():
    verify = {1: 0.136, 2: 0.145, 3: 0.30, 4: 0.107, 5: 0.107, 6: 0.2}
    for limit, goes_on in ((6, True), (2, False), (1, False)):  # 2 -> 3 loses, 2 -> 4 wins, where there is room
        made = set_round(limit, 8.0, 0.01, verify).step(np.array([0.5]))
        assert made.go_on.tolist() == [goes_on] and made.submit.all()


def test_a_last_look_that_is_not_worth_its_row_is_dropped():
    for row, submits in ((0.001, True), (0.0014, True), (0.0016, False)):
        made = set_round(1, 600.0, 0.01, {1: 0.02, 9: 0.02 + 8 * row}).step(np.array([0.5]))
        assert made.submit.tolist() == [submits]  # 0.9 tokens for 600 * row


def test_stops_early_on_low_scores_and_late_on_high_ones():
    rule = paper_rule(guarded=False)
    lengths = []
    for score in (0.3, 0.8, 0.99):
        round_ = rule.begin(["a"], [8])
        while round_.running.any():
            round_.step(np.array([score]))
        lengths.append(int(round_.lengths[0]))
    assert lengths[0] == 1 and lengths[0] < lengths[1] < lengths[2] == 8


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("max_lengths", [[], [0], [0, 3, 1], [1, 1]])
def test_bounds_hold_for_odd_batches(lag, max_lengths):
    rule = paper_rule(lag=lag)
    for _ in range(5):
        round_ = rule.begin([str(i) for i in range(len(max_lengths))], max_lengths)
        while round_.running.any():
            round_.step(np.full(len(max_lengths), np.nan))
        assert (round_.lengths <= np.array(max_lengths)).all()
        rule.finish(round_, round_.lengths.tolist(), round_.lengths.tolist(), 0.05, 0.1)
    assert np.isfinite(rule.tokens_per_second(1))


def test_nan_scores_fall_back_on_the_mean_acceptance():
    rule, rng = paper_rule(), np.random.default_rng(0)
    lengths = []
    for _ in range(300):
        round_ = rule.begin(["a"], [8])
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
    for _ in range(150):
        scores, other = rng.beta(4, 1, (8, 3)), rng.beta(4, 1, (8, 3))
        # Candidate k + 1 is decided at step k: with the scores up to k alike, all decisions so far are alike.
        for k in range(1, 4):
            one, two = rule_pair(rule)
            rounds = [r.begin(["a", "b", "c"], [8, 8, 8]) for r in (one, two)]
            for step in range(8):
                if not all(r.running.any() for r in rounds):
                    break
                rows = (scores[step], scores[step] if step < k else other[step])
                made = [r.step(row) for r, row in zip(rounds, rows, strict=True)]
                if step < k:
                    assert (made[0].submit == made[1].submit).all() and (made[0].go_on == made[1].go_on).all()
                    decided.add(tuple(made[0].go_on))
        serve(rule, scores, rng)
    assert len(decided) >= 3  # the rule did decide


def rule_pair(rule):
    return copy.deepcopy(rule), copy.deepcopy(rule)


def serve(rule, scores, rng):
    round_ = rule.begin(["a", "b", "c"], [8, 8, 8])
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
            round_ = rule.begin(["a"], [8])
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
        round_ = rule.begin(list("abcd"), [4] * 4)
        while round_.running.any():
            round_.step(np.full(4, np.nan))
        accept = np.array([0.95, 0.95, 0.95, 0.02])
        wins = [
            int(np.argmin(np.append(rng.random(n) < p, False))) for n, p in zip(round_.lengths, accept, strict=True)
        ]
        rule.finish(round_, round_.lengths.tolist(), wins)
        drafted += (round_.lengths > 0) * (turn >= 200)
    assert drafted[:3].min() > 150 and drafted[3] < 40


@pytest.mark.parametrize(("num_reqs", "accepted", "drafted", "passes"), [(1, 2, 3, 3), (4, 1, 2, 2), (2, 0, 4, 4)])
def test_the_gate_says_what_drafting_brings_even_where_it_chooses_none(num_reqs, accepted, drafted, passes):
    verify = {1: 1.0, 64: 1.0 + 63 * 0.01}
    costs = CostModel({1: 0.1, 8: 0.17}, {1: 0.08, 8: 0.15}, verify, max_reqs=8)
    gate, ids = StartGate(), list("abcd"[:num_reqs])
    for _ in range(3000):
        gate.update(ids, [accepted] * num_reqs, [drafted] * num_reqs, 0.5, passes, False)
    chosen, _ = gate.choose(ids, np.ones(num_reqs, dtype=bool), num_reqs / costs.verify.at(num_reqs), costs)
    assert chosen.any() == (accepted > 0)
    drafting = 0.1 + 0.01 * (num_reqs - 1) + (passes - 1) * (0.08 + 0.01 * (num_reqs - 1))
    if accepted:
        seconds = drafting + 1.0 + 0.01 * (num_reqs * (1 + drafted) - 1)
        tokens = num_reqs * (1 + accepted)
    else:  # the least harm: one request alone
        seconds = 0.1 + (passes - 1) * 0.08 + 1.0 + 0.01 * (num_reqs + drafted - 1)
        tokens = num_reqs
    off = num_reqs / (1.0 + 0.01 * (num_reqs - 1))
    assert gate.speedup == pytest.approx(tokens / seconds / off, rel=0.01)


def test_the_gate_says_what_drafting_for_some_brings():
    """A pass takes the same for one request as for four: four pay for it together, one alone does not."""
    costs = CostModel({1: 0.4, 8: 0.4}, {1: 0.4, 8: 0.4}, {1: 1.0, 64: 1.0}, max_reqs=8)
    gate, ids = StartGate(), list("abcd")
    for _ in range(3000):
        gate.update(ids, [1] * 4, [1] * 4, 0.4, 1, False)
    everyone = np.ones(4, dtype=bool)
    chosen, _ = gate.choose(ids, everyone, 4.0, costs)
    assert chosen.all() and gate.speedup_with(ids, everyone, costs) == pytest.approx(gate.speedup)
    alone = gate.speedup_with(ids, np.array([False, True, False, False]), costs)
    assert alone == pytest.approx((1 + 1 / 4) / 1.4, rel=1e-3) and alone < 1
    assert gate.speedup_with(ids, ~everyone, costs) == 1.0


def flat_costs(first, step):
    return CostModel({1: first}, {1: step}, {1: 1.0, 64: 1.0}, max_reqs=1)


def ask(gate, costs, rate=1.0):
    chosen, probe = gate.choose(["a"], np.array([True]), rate, costs)
    return bool(chosen[0]), probe


@pytest.mark.parametrize(("first", "pays"), [(0.7, True), (0.97, True), (1.05, False)])
@pytest.mark.parametrize("rho", [1.0, 1.6, 2.5])
def test_a_stretch_is_drafted_where_that_beats_no_drafting_whatever_others_brought(first, pays, rho):
    """Two tokens for 1 + first seconds, against one for 1: better, though not as good as rho was elsewhere."""
    gate, costs = StartGate(), flat_costs(first, first)
    for _ in range(3000):
        gate.update(["a"], [1], [1], first, 1, False)
    assert ask(gate, costs, rho)[0] == pays
    assert gate.speedup == pytest.approx(2 / (1 + first), rel=1e-3)


def test_a_return_that_fails_at_once_is_not_followed_by_a_burst_of_probes():
    """One request of eight drafts in a probe, since the draft model has not read the others, and is lucky."""
    gate, ids = StartGate(), list("abcdefgh")
    costs = CostModel({1: 0.3}, {1: 0.3}, {1: 1.0, 128: 1.0}, max_reqs=8)

    def rounds(num, probed, accepted):
        """Which of them drafted; outcomes of the probes' one request, and of all requests in the others."""
        drafted = []
        for _ in range(num):
            chosen, probe = gate.choose(ids, np.ones(8, dtype=bool), 8.0, costs)
            drafted.append(bool(chosen.any()))
            if drafted[-1]:
                wins = probed if probe else accepted
                gate.update(ids[: len(wins)], wins, [1] * len(wins), 0.3 * 8 / len(wins), 1, probe)
        return drafted

    for turn in range(3000):
        gate.update(ids, [1, 0, 0, 1 if turn % 5 == 0 else 0, 0, 1, 0, 0], [1] * 8, 0.3, 1, False)
    one = [0, 0, 0, 0, 0, 0, 0, 1]
    assert 0 < sum(rounds(400, [0], one)) <= 14
    returns = next(number for number in range(1, 5000) if rounds(1, [1], one) and gate.drafting)
    assert returns > 1
    assert sum(rounds(48, [0], one)) <= 2
    assert not gate.drafting
    assert all(rounds(600, [1], [1] * 8)[-300:])  # the workload has changed for good


def test_requests_are_forgotten_and_unknown_outcomes_taken():
    rule = paper_rule()
    rule.start.max_requests = 10
    for i in range(50):
        round_ = rule.begin([f"r{i}", f"s{i}"], [8, 8])
        while round_.running.any():
            round_.step(np.array([0.9, 0.9]))
        rule.finish(round_, [None, int(round_.lengths[1])], [0, int(round_.lengths[1])])
    assert len(rule.start) <= 10
    assert rule.tokens_per_second(2) > 2 / 0.109


def test_rate_is_never_below_no_speculation_and_moves_with_the_batch():
    rate = RateEstimate()
    assert rate.speedup(1) is None
    for _ in range(400):
        rate.update(1, 1.0, 0.2, 0.1)
    assert rate.speedup(1) == 1.0
    for _ in range(600):
        rate.update(4, 12.0, 0.15, 0.1)
    assert rate.speedup(4) == pytest.approx(2.0, rel=0.03) and rate.speedup(3) == rate.speedup(4)
    assert rate.speedup(1) == 1.0 and rate.speedup(16) == pytest.approx(2.0, rel=0.03)


def test_fixed_tokens_counts_and_continues_what_was_cut():
    tokens = fixed_tokens([1, 2, 0], [3, 2, 1], [1], np.full((1, 4), 0.5), [4, 4, 4])
    # Request 0: rejected at 2. Request 1: all of 2 accepted, then 0.5, 0.25 more. Request 2: rejected at once.
    assert tokens.tolist() == pytest.approx([3.0, 2 + 2 + 1, 2 + 3 + 1, 2 + 3.5 + 1, 2 + 3.75 + 1])


def test_fixed_tokens_stop_where_a_request_has_no_room():
    following = np.full((1, 4), 0.5)
    assert fixed_tokens([2], [2], [0], following, [3]).tolist() == pytest.approx([1, 2, 3, 3.5, 3.5])
    assert fixed_tokens([], [], [], np.empty((0, 4)), []).tolist() == [0.0] * 5


def test_guard_lets_go_of_a_length_that_another_beats():
    guard = Guard(3)
    seconds, rng = np.array([0.1, 0.13, 0.16, 0.19]), np.random.default_rng(0)

    def rounds(num, wins):
        for _ in range(num):
            held = guard.tick()
            tokens = np.array([1, 1.5, 2.0, 2.2]) + 0.6 * (np.arange(4) == wins) + rng.normal(0, 0.2)
            own = 2 if held is None else held
            guard.update(tokens[own] - (0.3 if held is None else 0), seconds[own], tokens, seconds)

    guard._hold = 1024
    rounds(150, 2)
    assert guard.length == 2
    rounds(150, 1)  # the workload changes long before the time is up
    assert guard.length != 2


def test_guard_does_not_hold_nothing_for_long():
    guard = Guard(2)
    guard._hold = 2048
    for _ in range(100):
        guard.tick()
        guard.update(1.1, 0.2, np.array([1.0, 1.1, 1.2]), np.array([0.1, 0.2, 0.3]))
        if guard.length is not None:
            break
    assert guard.length == 0
    assert [guard.tick() for _ in range(300)][-1] is None


@pytest.mark.parametrize("lag", [0, 1])
def test_a_round_that_costs_nothing_drafts_to_the_limits(lag):
    rule = paper_rule(lag=lag)
    round_ = CostAwareRound(rule, ["a", "b", "c"], np.array([3, 8, 5]), np.array([True, True, False]), 0.0)
    while round_.running.any():
        round_.step(np.array([0.0, np.nan, 1.0]))
    assert round_.lengths.tolist() == [3, 8, 0] and round_.widths == [2, 2, 2, 1, 1, 1, 1, 1]


def test_guard_yields_to_what_wins_and_comes_back():
    guard = Guard(3)
    seconds, rng = np.array([0.1, 0.13, 0.16, 0.19]), np.random.default_rng(0)
    taken = []
    for _ in range(300):
        if guard.tick() is None:  # what K = 2 would emit is 20 % more per second than the rule's
            guard.update(2 + rng.normal(0, 0.5), 0.16, np.array([1, 1.5, 2.4, 2.5]) + rng.normal(0, 0.3), seconds)
        taken.append(guard.length)
    assert taken[0] is None and 2 in taken and set(taken) == {None, 2}
    assert None in taken[taken.index(2) :]  # tries again
    quiet = Guard(3)
    for _ in range(600):
        assert quiet.tick() is None
        quiet.update(2.4 + rng.normal(0, 0.5), 0.16, np.array([1, 1.5, 2.4, 2.5]) + rng.normal(0, 0.3), seconds)


def test_a_length_below_one_is_refused():
    with pytest.raises(ValueError, match="^specdecpp: num_speculative_tokens=0"):
        CostAwareRule(CostModel(*PAPER), 0)
