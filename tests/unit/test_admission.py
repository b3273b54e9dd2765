# SPDX-License-Identifier: Apache-2.0
"""Who drafts: the formula against all that it may choose, what is tried and paid for, and what is learnt."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from vllm_specdecpp.costs.model import CostModel
from vllm_specdecpp.decision.cost_aware import admission
from vllm_specdecpp.decision.cost_aware.admission import Standing
from vllm_specdecpp.decision.cost_aware.free_runs import Taken
from vllm_specdecpp.decision.cost_aware.purse import Purse
from vllm_specdecpp.decision.cost_aware.records import Records
from vllm_specdecpp.decision.cost_aware.rule import CostAwareRule

INT8 = {1: 0.091, 2: 0.127, 3: 0.147, 4: 0.172, 6: 0.209, 8: 0.235, 11: 0.289, 21: 0.469}
"""Verifications of the int8 Qwen pair on a CPU, where drafting pays in long drafts only."""
READ = {1: 0.044, 256: 0.5}


def costs(
    first: float = 0.02, step: float = 0.02, verify: dict[int, float] | None = None,
    read: dict[int, float] | None = None,
) -> CostModel:  # fmt: skip
    flat, passes = {1: 0.1, 200: 0.1}, ({1: first, 8: first}, {1: step, 8: step})
    return CostModel(*passes, verify or flat, read or READ, max_reqs=8, max_tokens=200)


def standing(name: str = "a", limit: int = 20, room: int = 1000, behind: int = 0, emitted: int = 1) -> Standing:
    return Standing(name, limit, room, behind, emitted)


def plan(
    batch: Sequence[Standing], model: CostModel, accept: dict[str, float] | None = None, mean: float = 0.7,
    looks: float = 500.0, purse: float = 0.0,
) -> tuple[admission.Admission, admission.Admitted]:  # fmt: skip
    """What is decided with these acceptances, known for sure."""
    made, money = admission.Admission(), Purse()
    made.records.mean, made.records.looks = mean, looks
    for name, own in (accept or {}).items():
        made.records._requests[name] = 1e9, 1e9 * own, 0
    money.balance = purse
    return made, made.plan(batch, model, money)


def best(
    model: CostModel, num_reqs: int, accept: Sequence[float], limits: Sequence[int], charges: Sequence[float],
    free_rows: Sequence[int] = (), free_tokens: Sequence[float] = (),
) -> tuple[float, Any, int]:  # fmt: skip
    """The formula's, where requests have these free runs."""
    rows, tokens = np.resize(free_rows or [0], len(accept)), np.resize(free_tokens or [0.0], len(accept))
    return admission._best(
        model, num_reqs + int(rows.sum()), num_reqs + float(tokens.sum()), np.array(accept), np.array(limits),
        np.array(charges), rows, tokens,
    )  # fmt: skip


def brute_force(
    model: CostModel, num_reqs: int, accept: Sequence[float], limits: Sequence[int], charges: Sequence[float],
    free_rows: Sequence[int] = (), free_tokens: Sequence[float] = (),
) -> float:  # fmt: skip
    """The most tokens a second over all sets of requests and all candidate lengths."""
    free_rows, free_tokens = free_rows or [0] * len(accept), free_tokens or [0.0] * len(accept)
    best = 0.0
    for count in range(1, len(accept) + 1):
        for chosen in itertools.combinations(range(len(accept)), count):
            for length in admission._LENGTHS.tolist():
                stay = [i for i in range(len(accept)) if i not in chosen]
                tokens, rows = num_reqs + sum(free_tokens[i] for i in stay), num_reqs + sum(free_rows[i] for i in stay)
                seconds = 0.0
                for i in chosen:
                    mine = min(length, limits[i])
                    gain = sum(accept[i] ** k for k in range(1, mine + 1))
                    tokens, rows, seconds = tokens + gain, rows + mine, seconds + charges[i] * (1 + gain)
                seconds += model.first.at(count) + (length - 1) * model.step.at(count) + model.verify.at(rows)
                if length <= max(limits[i] for i in chosen) or length == admission._LENGTHS[0]:
                    best = max(best, tokens / seconds)
    return best


@pytest.mark.parametrize("seed", range(20))
def test_the_best_set_is_found(seed: int) -> None:
    rnd = random.Random(seed)
    num = rnd.randint(1, 5)
    accept = [rnd.uniform(0.1, 0.98) for _ in range(num)]
    limits = [20] * num  # of equal limits the best n are the most accepted
    verify = {1: 0.05, 4: rnd.uniform(0.05, 0.1), 200: rnd.uniform(0.1, 2.0)}
    model = costs(rnd.uniform(0.001, 0.05), rnd.uniform(0.001, 0.05), verify)
    found, chosen, _ = best(model, num + 1, accept, limits, [0.0] * num)
    assert found == pytest.approx(brute_force(model, num + 1, accept, limits, [0.0] * num))
    assert sorted(accept[i] for i in chosen) == sorted(accept)[num - len(chosen) :]


@pytest.mark.parametrize("seed", range(20))
def test_drafting_replaces_free_runs(seed: int) -> None:
    """Alike in all but their runs: who drafts are those whose runs promise least."""
    rnd = random.Random(100 + seed)
    num, accept = rnd.randint(1, 5), rnd.uniform(0.3, 0.95)
    tokens = [rnd.uniform(0.0, 4.0) for _ in range(num)]
    rows = [rnd.randint(4, 8) if rnd.random() < 0.1 else 5] * num
    model = costs(rnd.uniform(0.001, 0.05), rnd.uniform(0.001, 0.05), {1: 0.05, 200: rnd.uniform(0.1, 0.6)})
    given = model, num + 1, [accept] * num, [20] * num, [0.0] * num, rows, tokens
    found, chosen, _ = best(*given)
    assert found == pytest.approx(brute_force(*given))
    assert sorted(tokens[i] for i in chosen) == sorted(tokens)[: len(chosen)]


def test_reading_is_part_of_the_price() -> None:
    model = costs()
    found, _, length = best(model, 1, [0.8], [20], [0.01])
    assert found == pytest.approx(brute_force(model, 1, [0.8], [20], [0.01]))
    free, _, _ = best(model, 1, [0.8], [20], [0.0])
    assert 1 / found == pytest.approx(1 / free + 0.01, rel=0.02) and length > 1


@pytest.mark.parametrize(("accept", "drafts"), [(0.9, True), (0.1, False)])
def test_drafts_where_it_pays_and_at_the_rate_that_it_brings(accept: float, drafts: bool) -> None:
    model = costs(0.05, 0.05)
    made, admitted = plan([standing()], model, {"a": accept})
    assert admitted.drafts.tolist() == [drafts] and not admitted.trial
    if drafts:
        assert admitted.price == pytest.approx(brute_force(model, 1, [accept], [20], [0.0])) and made.speedup > 1.2
    else:
        assert admitted.price == pytest.approx(10) and made.speedup == 1


@pytest.mark.asks(3)
@pytest.mark.parametrize("prompts", [0, 4])
def test_prompts_that_are_read_in_the_batch_switch_nobody_off(prompts: int) -> None:
    """And there is no threshold: with more requests throughput never falls, nor below that of off."""
    model, before = costs(0.01, 0.01, {1: 0.1, 8: 0.1, 200: 0.9}), 0.0
    for num in range(1, 33):
        batch = [standing(f"r{i}") for i in range(num)] + [standing(f"p{i}", limit=0) for i in range(prompts)]
        made, admitted = plan(batch, model, {f"r{i}": 0.9 for i in range(num)})
        assert admitted.drafts[:num].any() or num > 4
        off_rate = len(batch) / model.verify.at(len(batch))
        assert admitted.price >= max(before, off_rate) and made.speedup >= 1
        before = 0.99 * admitted.price


def test_who_may_not_draft_does_not() -> None:
    _, admitted = plan([standing("a", limit=0), standing("b")], costs(), {"a": 0.95, "b": 0.95})
    assert admitted.drafts.tolist() == [False, True]
    _, admitted = plan([standing("a", limit=0)], costs(), {"a": 0.95})
    assert not admitted.drafts.any()


def test_a_request_of_poor_text_does_not_draft_beside_others_that_do() -> None:
    rows = {1: 0.1, 200: 2.5}
    _, admitted = plan([standing(n) for n in "abc"], costs(0.01, 0.01, rows), {"a": 0.95, "b": 0.05, "c": 0.9})
    assert admitted.drafts.tolist() == [True, False, True]


def test_long_drafts_are_seen_where_only_they_pay() -> None:
    """The costs of the int8 pair: drafts of a few candidates lose at any acceptance below 0.9."""
    model = costs(0.044, 0.040, INT8)
    _, admitted = plan([standing()], model, {"a": 0.95})
    assert admitted.drafts.all() and admitted.price > 1.15 / model.verify.at(1)
    _, admitted = plan([standing(limit=2)], model, {"a": 0.80})
    assert not admitted.drafts.any()


class TestReading:
    def test_a_prompt_is_read_if_its_answer_pays_for_it(self) -> None:
        model = costs(0.05, 0.05, read={1: 0.05, 1000: 5.0})
        for room, reads in ((4, False), (500, True)):
            made, money = admission.Admission(), Purse()
            made.records.mean, made.records.looks = 0.85, 500.0
            made.lengths.restore({"mean": 500.0, "weight": 64.0})
            assert made.plan([standing(room=room, behind=400)], model, money).drafts.tolist() == [reads], room

    def test_a_request_that_goes_on_is_read_in_time(self) -> None:
        """Ski rental: it has emitted as much as it must yet emit to pay for what it missed."""
        model = costs(0.05, 0.05, read={1: 0.05, 1000: 20.0})
        made, money = admission.Admission(), Purse()
        made.records.mean, made.records.looks = 0.85, 500.0
        made.lengths.restore({"mean": 10.0, "weight": 64.0})
        read = [n for n in range(1, 400) if made.plan([standing(behind=100, emitted=n)], model, money).drafts.any()]
        assert read and 50 < read[0] < 150 and read == list(range(read[0], 400))

    def test_where_runs_may_bring_the_text_it_is_read_as_late_and_for_what_they_leave(self) -> None:
        """The usual answer is long; how much of it runs will bring shows in time."""
        model, read = costs(0.05, 0.05, read={1: 0.05, 1000: 20.0}), {}
        for by_runs in (0, 80):
            made, money, none = admission.Admission(), Purse(), Taken([None], np.zeros(1, np.int64), np.zeros(1))
            made.records.mean, made.records.looks = 0.85, 500.0
            made.lengths.restore({"mean": 1000.0, "weight": 64.0})
            assert made.plan([standing(behind=100)], model, money).drafts.all()
            for emitted in range(1, 400):
                if made.plan([standing(behind=100, emitted=emitted)], model, money, none).drafts.any():
                    break
                made.lengths.brought(["a"], [by_runs * (emitted == 1)])
            read[by_runs] = emitted
        assert 20 < read[0] < 200 and read[80] == read[0] + 80

    @pytest.mark.parametrize("behind", [0, 100])
    def test_a_request_that_is_alone_for_a_moment_is_read_for_the_usual_batch(self, behind: int) -> None:
        """Alone drafting pays, at the usual batch of eight it does not: it is not worth reading its prompt."""
        model = costs(0.02, 0.02, {1: 0.1, 8: 0.1, 200: 4.0})
        made, money = admission.Admission(), Purse()
        made.records.mean, made.records.looks = 0.8, 500.0
        made.lengths.restore({"mean": 300.0, "weight": 64.0})
        for _ in range(200):
            assert not made.plan([standing(n) for n in "abcdefgh"], model, money).drafts.any()
        assert made.plan([standing("i", behind=behind)], model, money).drafts.tolist() == [behind == 0]

    def test_a_batch_that_is_far_behind_is_read_over_several_rounds(self) -> None:
        """Drafting pays for all of them at once; nobody waits for a token until all of them are read."""
        model = costs(0.02, 0.02, read={1: 0.001, 1000: 1.0})  # a verification takes as long as 100 tokens
        made, money = admission.Admission(), Purse()
        made.records.mean, made.records.looks = 0.8, 500.0
        made.lengths.restore({"mean": 300.0, "weight": 64.0})
        behind = dict(zip("abcdefgh", (900, 150, 150, 150, 150, 0, 0, 700), strict=True))
        drafting: list[set[str]] = []
        while not drafting or drafting[-1] != set(behind):
            admitted = made.plan([standing(n, behind=count) for n, count in behind.items()], model, money)
            drafting.append({n for n, drafts in zip(behind, admitted.drafts, strict=True) if drafts})
            reading = [behind[n] for n in behind if n in drafting[-1] and behind[n]]
            assert sum(reading[:-1]) <= admission._MOST_READING * 100
            assert admitted.reading == pytest.approx(sum(map(model.extra_seconds, reading)))
            assert not admitted.expected or drafting[-1] == set(behind)  # of a few the formula has said nothing
            behind |= dict.fromkeys(drafting[-1], 0)
        assert drafting == [set("afg"), set("abcdfg"), set(behind)]

    def test_a_request_that_is_far_behind_has_its_turn(self) -> None:
        """However many others are a little behind in each round."""
        model = costs(0.02, 0.02, read={1: 0.001, 1000: 1.0})
        made, money = admission.Admission(), Purse()
        made.records.mean, made.records.looks = 0.8, 500.0
        made.lengths.restore({"mean": 300.0, "weight": 64.0})
        for place in range(8):
            batch = [standing(str(i), behind=500 if i == place else 20) for i in range(8)]
            assert made.plan(batch, model, money).drafts[place]

    def test_a_trial_of_nobody_is_none(self, monkeypatch) -> None:
        """All whom it was for are put off; what it had staked comes back when the round is over."""
        model, num = costs(0.02, 0.02, read={1: 0.001, 1000: 1.0}), 7
        behind, emitted = (300, 300, 600, 300, 150, 600, 150), (127, 7, 173, 81, 10, 137, 100)
        batch = [standing(str(i), behind=behind[i], emitted=emitted[i]) for i in range(num)]
        for bound in (1e9, admission._MOST_READING):
            monkeypatch.setattr(admission, "_MOST_READING", bound)
            made, money = admission.Admission(), Purse()
            made.records.mean, made.records.looks = 0.3, 500.0
            made.records._requests.update({"2": (3.0, 2.59, 0), "4": (1000.0, 435.24, 0), "6": (20.0, 16.01, 0)})
            made.lengths.restore({"mean": 300.0, "weight": 64.0})
            money.open(num, 0.1)
            money.balance = 100.0
            admitted = made.plan(batch, model, money)
            assert admitted.trial == admitted.drafts.all() == (bound > 4) and admitted.staked > 0
        assert admitted.drafts.tolist() == [True, True, *[False] * 5]
        assert admitted.baseline == num / model.verify.at(num)

    def test_what_a_pass_of_its_own_takes_counts(self) -> None:
        model = costs(0.05, 0.05, read={1: 0.001, 1000: 0.002})
        made, money = admission.Admission(), Purse()
        made.records.mean, made.records.looks = 0.85, 500.0
        near, far = Standing("a", 20, 30, 1, 1), Standing("a", 20, 30, 1, 1, apart=5.0)
        assert made.plan([near], model, money).drafts.all() and not made.plan([far], model, money).drafts.any()


class TestTrials:
    def test_before_anything_is_known_all_is_a_trial_and_the_purse_pays(self) -> None:
        model = costs(0.09, 0.09)  # at the acceptance that is taken before anything is known it loses
        _, admitted = plan([standing()], model, looks=4.0, purse=10.0)
        assert admitted.drafts.all() and admitted.trial and 0.5 < admitted.price * model.verify.at(1) <= 1
        _, admitted = plan([standing()], model, looks=4.0, purse=0.0)
        assert not admitted.drafts.any()

    def test_what_cannot_pay_is_not_tried(self) -> None:
        _, admitted = plan([standing()], costs(0.5, 0.5), {"a": 0.3}, purse=100.0)
        assert not admitted.drafts.any()

    def test_a_new_request_is_tried_where_the_usual_one_does_not_pay(self) -> None:
        model = costs(0.05, 0.05)
        _, known = plan([standing()], model, {"a": 0.35}, mean=0.35, purse=10.0)
        _, new = plan([standing()], model, mean=0.35, purse=10.0)
        assert not known.drafts.any() and new.drafts.all() and new.trial

    def test_one_is_tried_beside_others_that_draft(self) -> None:
        model = costs(0.03, 0.03, {1: 0.1, 200: 4.0})
        _, admitted = plan([standing("a"), standing("b")], model, {"a": 0.95}, mean=0.3, purse=10.0)
        _, poor = plan([standing("a"), standing("b")], model, {"a": 0.95}, mean=0.3, purse=0.0)
        assert admitted.drafts.tolist() == [True, True] and admitted.trial
        assert poor.drafts.tolist() == [True, False] and not poor.trial and admitted.price == poor.price


def serve(
    rule: CostAwareRule, texts: Callable[[int], float], model: CostModel, rounds: int, length: int = 64, seed: int = 0
) -> dict[str, Any]:
    """One request after the other with true costs ``model``; the n-th has acceptance ``texts(n)`` and no scores."""
    rnd, tokens, seconds, drafted, number, emitted, behind = random.Random(seed), 0, 0.0, [], 0, 1, 100
    for _ in range(rounds):
        round_ = rule.begin([standing(str(number), room=length - emitted, behind=behind, emitted=emitted)])
        while round_.running.any():
            round_.step(None)
        num, won = int(round_.lengths[0]), 0
        while won < num and rnd.random() < texts(number):
            won += 1
        reading = model.read_seconds(behind) if round_.widths else 0.0
        draft, verify = model.draft_seconds(round_.widths) + reading, model.verify.at(1 + num)
        rule.finish(round_, [num], [won], draft, verify)
        drafted.append((number, num, won + 1, draft + verify))
        tokens, seconds, emitted = tokens + won + 1, seconds + draft + verify, emitted + won + 1
        behind = 0 if round_.widths else behind + 1
        if emitted >= length - 2:
            number, emitted, behind = number + 1, 1, 100
    return {"rate": tokens / seconds, "tokens": tokens, "seconds": seconds, "rounds": drafted}


def test_a_cold_start_drafts_at_once_where_long_drafts_pay() -> None:
    """The int8 pair, code: the rule of before drafted nothing in its first 401 rounds."""
    model = costs(0.044, 0.040, INT8)
    rule = CostAwareRule(costs(0.044, 0.040, INT8), 20)
    run = serve(rule, lambda n: 0.95, model, 200)
    assert run["rounds"][0][1] > 0
    assert run["rate"] > 1.1 / INT8[1]
    drafted = [r for r in run["rounds"] if r[1]]
    assert len(drafted) > 0.95 * len(run["rounds"])


@pytest.mark.parametrize("accept", [*(pytest.param(a, marks=pytest.mark.slow) for a in (0.0, 0.2)), 0.5])
def test_text_that_never_pays_costs_the_purse_and_no_more(accept: float) -> None:
    model = costs(0.044, 0.040, INT8)
    rule = CostAwareRule(costs(0.044, 0.040, INT8), 20)
    for rounds, most in ((2000, 0.03), (8000, 0.012)):
        run = serve(rule, lambda n: accept, model, rounds)
        assert 1 - run["rate"] * INT8[1] < most


def test_an_easy_request_is_found_among_hard_ones_and_a_hard_one_left() -> None:
    model = costs(0.03, 0.03)
    rule = CostAwareRule(costs(0.03, 0.03), 20)
    serve(rule, lambda n: 0.1, model, 400)
    run = serve(rule, lambda n: 0.95 if n % 2 else 0.05, model, 2000, length=200)
    assert any(r[1] for r in run["rounds"] if r[0] in (1, 3)), "one of the first easy requests is found"
    of = {kind: [r for r in run["rounds"] if r[0] % 2 == kind and r[0] > 3] for kind in (0, 1)}
    easy, hard = (sum(r[1] > 0 for r in of[kind]) / len(of[kind]) for kind in (1, 0))
    assert easy > 0.95 and hard < 0.1


def test_drafting_that_is_faster_than_the_formula_says_is_believed() -> None:
    made = admission.Admission()
    admitted = admission.Admitted(np.array([True]), 12.0, 12.0, expected=12.0)
    for _ in range(400):
        made.learn(admitted, tokens=2.64, seconds=0.2, off_seconds=0.1)
    assert made.correction == pytest.approx(1.1, abs=0.01)
    before = made.correction
    made.learn(admission.Admitted(np.array([True]), 10.0, 10.0, trial=True), 1.0, 9.0, 0.1)
    assert made.correction == before, "a trial says nothing of drafted rounds"


def test_a_second_start_is_warm() -> None:
    model = costs(0.044, 0.040, INT8)
    rule = CostAwareRule(costs(0.044, 0.040, INT8), 20)
    serve(rule, lambda n: 0.95, model, 300)
    again = CostAwareRule(costs(0.044, 0.040, INT8), 20)
    again.restore(json.loads(json.dumps(rule.state())))
    round_ = again.begin([standing()])
    assert round_.drafts.all() and not round_.trial and round_.price > 1.1 / INT8[1]
    old = CostAwareRule(costs(0.044, 0.040, INT8), 20)
    old.restore(rule.state(), age_seconds=30 * 86400)
    assert old.begin([standing()]).trial, "what is a month old says little"


@pytest.mark.parametrize("damage", [{"fit": [0.0, 1.0]}, {"fit": []}, {"lengths": None}, {"records": {"mean": "x"}}])
def test_a_damaged_state_leaves_the_rule_as_it_was(damage: dict[str, Any]) -> None:
    rule = CostAwareRule(costs(0.044, 0.040, INT8), 20)
    serve(rule, lambda n: 0.95, costs(0.044, 0.040, INT8), 30)
    again = CostAwareRule(costs(0.044, 0.040, INT8), 20)
    before, state = again.state(), rule.state()
    state["admission"] |= damage
    assert not again.restore(state) and again.state() == before
    assert not again.restore(rule.state() | {"scores": "another head"}) and again.state() == before
    assert again.restore(rule.state())


class TestRecords:
    def test_a_request_is_drawn_to_all_others_and_away_from_them(self) -> None:
        records = Records()
        records.update(["a"] * 50, [4.0] * 50, [2.0] * 50)
        assert records.mean == pytest.approx(0.5, abs=0.01)
        records.update(["b", "c"], [12.0, 12.0], [7.0, 0.0])
        (new, better, worse), _ = records.of(["x", "b", "c"])
        assert new == records.mean and worse < 0.3 < new < better < 0.6

    def test_easy_until_its_looks_say_otherwise(self) -> None:
        """After poor text for long, a request is hoped to be easy, and known to be after one long run."""
        records = Records()
        records.update(["a"] * 200, [4.0] * 200, [1.2] * 200)
        (mean,), (hope,) = records.of(["new"])
        assert mean == pytest.approx(0.3, abs=0.01) and hope == 0.95
        records.update(["poor", "easy"], [1.0, 10.0], [0.0, 10.0])
        (poor, easy), (given_up, _) = records.of(["poor", "easy"])
        assert given_up == poor < 0.3 and easy > 0.9
        for _ in range(1000):
            records.served()
        assert records.of(["poor"])[1][0] == 0.95, "what it was like long ago says little"

    def test_the_mean_stays_what_it_was(self) -> None:
        records = Records()
        records.update(["a"] * 50, [4.0] * 50, [2.0] * 50)
        before = records.mean, records.known
        for _ in range(5000):
            records.served()
        assert (records.mean, records.known) == before

    def test_requests_are_forgotten(self) -> None:
        records = Records(max_requests=10)
        for i in range(100):
            records.update([str(i)], [1.0], [1.0])
        assert len(records._requests) == 10 and "99" in records._requests

    @pytest.mark.parametrize("state", [{}, {"mean": 2.0, "looks": 9.0}, {"mean": 0.5, "looks": float("nan")}])
    def test_a_damaged_state_is_not_taken_up(self, state: dict[str, float]) -> None:
        with pytest.raises((KeyError, ValueError)):
            Records().restore(state)


class TestPurse:
    def test_an_opening_sum_and_a_share_go_in_and_losses_come_out(self) -> None:
        purse = Purse(share=0.01, opening=10.0)
        purse.open(1, 0.1)
        assert purse.affords(1.0) and not purse.affords(1.1)
        staked = purse.stake(0.9)
        assert not purse.affords(0.2), "while a trial is under way it is paid for"
        purse.settle(0.8, staked)
        for _ in range(10):
            purse.open(1, 0.1)
            purse.earn(1.0)
        assert purse.balance == pytest.approx(0.3)
        purse.settle(-5.0, purse.stake(-5.0))
        assert purse.balance == pytest.approx(1.0), "what trials won is kept up to the opening sum"
