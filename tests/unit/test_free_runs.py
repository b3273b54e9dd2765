# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.standings import standings
from vllm_specdecpp.costs.model import CostModel
from vllm_specdecpp.decision.cost_aware.drafting import CostAwareRound
from vllm_specdecpp.decision.cost_aware.free_runs import WORTH, Before, FreeRuns
from vllm_specdecpp.decision.cost_aware.rule import CostAwareRule
from vllm_specdecpp.decision.cost_aware.tail import CostAwareTail
from vllm_specdecpp.decision.sources import Run
from vllm_specdecpp.decision.sources.suffix import SuffixSource


class Toy:
    """A source as a newcomer would add it: the last token once more."""

    name = "toy"
    depends_on = "the last token"
    start = (1.0, 0.0)

    def run(self, tokens, most):
        return np.resize(tokens[-1:], most), np.zeros(most)


def run_of(x, source: str = "toy") -> Run:
    return Run(source, list(range(len(x))), np.array(x, dtype=np.float64))


def costs(verify=None) -> CostModel:
    return CostModel({1: 0.05, 8: 0.06}, {1: 0.05, 8: 0.06}, verify or {1: 0.1, 200: 2.0}, max_reqs=8, max_tokens=200)


@pytest.mark.parametrize("drafted", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_the_rows_that_are_taken_are_the_best(seed: int, drafted: bool) -> None:
    rng = np.random.default_rng(seed)
    num = int(rng.integers(1, 4))
    runs = [[run_of(rng.normal(1, 2, rng.integers(1, 5)))] if rng.random() < 0.8 else [] for _ in range(num)]
    limits = rng.integers(0, 5, num)
    model, free = costs({1: 0.1, 3: rng.uniform(0.1, 0.2), 200: rng.uniform(0.3, 4)}), FreeRuns([Toy()])
    before = Before(num, float(num), 0.0, np.ones(num))
    if drafted:
        more = rng.integers(0, 5, num)
        before = Before(num + int(more.sum()), num + 0.7 * more.sum(), rng.uniform(0, 0.2), rng.uniform(0.1, 1, num))
    taken = free.take([str(i) for i in range(num)], runs, limits, model, before if drafted else None)
    chances = [free.chances(r[0])[:most] if r else np.empty(0) for r, most in zip(runs, limits, strict=True)]
    reaches = [s * c.cumprod() for s, c in zip(before.survival, chances, strict=True)]

    def speed(lengths) -> float:
        tokens = before.tokens + WORTH * sum(float(r[:n].sum()) for r, n in zip(reaches, lengths, strict=True))
        return tokens / (before.seconds + model.verify.at(before.rows + int(sum(lengths))))

    best = max(map(speed, itertools.product(*(range(len(c) + 1) for c in chances))))
    assert speed(taken.lengths) == pytest.approx(best)
    wanted = [float(r[:n].sum()) for r, n in zip(reaches, taken.lengths, strict=True)]
    assert taken.accepted == pytest.approx(wanted)
    assert all(len(taken.token_ids(i)) == taken.lengths[i] <= limits[i] for i in range(num))


def test_of_two_sources_the_better_run_is_taken() -> None:
    class Other(Toy):
        name = "other"

    free = FreeRuns([Toy(), Other()])
    taken = free.take(["a"], [[run_of([0.0, 0.0]), run_of([3.0, 3.0], "other")]], np.array([4]), costs())
    assert taken.runs[0] is not None and taken.runs[0].source == "other" and taken.lengths.tolist() == [2]


def test_learns_by_source_from_the_accepted_and_the_first_rejected() -> None:
    free, run = FreeRuns([SuffixSource(), Toy()]), run_of([0.0, 0.0, 0.0])
    before = free.models["suffix"].theta.copy()
    for _ in range(200):
        taken = free.take(["a"], [[run]], np.array([3]), costs({1: 0.1, 200: 0.11}))
        assert taken.lengths.tolist() == [3]
        free.learn(["a"], taken, [3], [1])  # one accepted, one rejected, one that tells nothing
    assert free.chances(run)[0] > 0.9 and free.chances(run)[1] < 0.1
    assert free.chances(run)[2] == pytest.approx(0.5, abs=0.3)
    assert (free.models["suffix"].theta == before).all()
    assert (free.candidates["toy"], free.accepted["toy"]) == (600, 200)
    for unknown in (None, 0):
        theta = free.models["toy"].theta.copy()
        free.learn(["a"], taken, [unknown], [0])
        assert (free.models["toy"].theta == theta).all()


def test_a_requests_own_runs_count_for_it_alone() -> None:
    """Where a source is mostly wrong its runs are left, though it is right elsewhere; and they are taken up again."""
    free, run, model = FreeRuns([Toy()]), run_of([1.0, 1.0, 1.0]), costs({1: 0.1, 200: 4.0})
    for _ in range(60):
        for name, won in (("code", 3), ("chat", 0)):
            taken = free.take([name], [[run]], np.array([3]), model)
            free.learn([name], taken, taken.lengths.tolist(), [min(won, int(taken.lengths[0]))])
    assert free.take(["code", "chat"], [[run], [run]], np.array([3, 3]), model).lengths.tolist() == [3, 0]
    assert free.chances(run, "chat")[0] < 0.3 < 0.6 < free.chances(run, "code")[0]
    assert free.chances(run, "another")[0] == free.chances(run)[0]


def test_a_source_that_was_left_is_tried_again() -> None:
    free, run, model = FreeRuns([Toy()]), run_of([1.0, 1.0, 1.0]), costs({1: 0.1, 200: 4.0})
    lengths = []
    for turn in range(4000):
        taken = free.take(["a"], [[run]], np.array([3]), model)
        lengths.append(int(taken.lengths[0]))
        free.learn(["a"], taken, taken.lengths.tolist(), [0 if turn < 200 else lengths[-1]])
    assert np.mean(lengths[50:200]) < 0.15 and lengths[-1] == 3


def test_a_large_batch_that_leaves_its_runs_forgets_no_faster_than_one_request(monkeypatch) -> None:
    monkeypatch.setattr("vllm_specdecpp.decision.cost_aware.free_runs._MAX_REQUESTS", 20)
    run, model, theta = run_of([-6.0]), costs({1: 0.1, 200: 40.0}), []
    for num in (1, 30):
        free, names = FreeRuns([Toy()]), [f"{num}-{i}" for i in range(num)]
        free.models["toy"].theta[1] = -1.0
        taken = free.take(names, [[run]] * num, np.full(num, 1), model)
        free.learn(names, taken, [0] * num, [0] * num)
        theta.append(float(free.models["toy"].theta[1]))
        assert not taken.lengths.any() and len(free._own) <= 20
    assert -1.0 < theta[0] == theta[1] < -0.99


def test_a_run_that_a_grammar_cuts_counts_against_its_request_alone() -> None:
    free, run, model = FreeRuns([Toy()]), run_of([1.0, 1.0]), costs({1: 0.1, 200: 4.0})
    theta = free.models["toy"].theta.copy()
    for _ in range(60):
        taken = free.take(["json"], [[run]], np.array([2]), model)
        free.learn(["json"], taken, [0], [0])
    assert taken.lengths.tolist() == [0] and free.take(["b"], [[run]], np.array([2]), model).lengths.tolist() == [2]
    assert free.models["toy"].theta == pytest.approx(theta, abs=0.01) and free.candidates["toy"] == 0


def _play(rule: CostAwareRule, run: Run | None, wins: int, rounds: int) -> list[int]:
    """Rounds of one request, whose drafts are never right; the lengths."""
    lengths = []
    for _ in range(rounds):
        round_ = rule.begin(standings(["a"], [8]), [[run] if run else []])
        while round_.running.any():
            round_.step(np.array([0.9]))
        submitted = int(round_.submitted[0])
        rule.finish(round_, [submitted], [0 if round_.drafts[0] else min(wins, submitted)])
        lengths.append(0 if round_.drafts[0] else submitted)
    return lengths


def test_a_run_that_is_right_is_taken_and_one_that_is_wrong_is_left() -> None:
    rule = CostAwareRule(costs(), 8, sources=[Toy()])
    assert max(_play(rule, None, 0, 60)) == 0
    assert _play(rule, run_of([1.0] * 8), 8, 60)[-1] == 8
    rule = CostAwareRule(costs(), 8, sources=[Toy()])
    assert np.mean(_play(rule, run_of([1.0] * 8), 0, 300)[100:]) < 0.3  # now and then it is tried again


def test_what_was_learnt_of_a_source_is_kept() -> None:
    rule = CostAwareRule(costs(), 8, sources=[Toy()])
    _play(rule, run_of([1.0] * 8), 8, 40)
    other = CostAwareRule(costs(), 8, sources=[SuffixSource(), Toy()])
    assert other.restore(rule.state())
    assert other.free_runs.models["toy"].theta == pytest.approx(rule.free_runs.models["toy"].theta)
    assert other.free_runs.models["suffix"].theta[:2] == pytest.approx(SuffixSource.start)


def test_a_request_that_drafts_leaves_its_run() -> None:
    """A weak run, a draft that is always right: the run's rows are not verified, and teach nothing."""
    rule = CostAwareRule(costs({1: 0.1, 200: 0.12}), 8, sources=[Toy()])
    for _ in range(80):
        round_ = rule.begin(standings(["a"], [8]), [[run_of([-1.0] * 8)]])
        while round_.running.any():
            round_.step(np.array([0.99]))
        submitted = int(round_.submitted[0])
        rule.finish(round_, [submitted], [submitted if round_.drafts[0] else 0])
    assert round_.drafts[0] and round_.free.token_ids(0) == [] and submitted == round_.lengths[0] > 0


def begun(chance: float, limits: list[int], step: float = 0.02) -> tuple[CostAwareRule, CostAwareRound, Run]:
    """A round of a rule that has seen drafts accepted in 9 of 10, and a run whose candidates have this chance."""
    rule = CostAwareRule(CostModel({1: step}, {1: step}, {1: 0.1, 200: 0.12}), 8, sources=[Toy()])
    names = [f"r{i}" for i in range(len(limits))]
    for _ in range(40):
        rule.admission.records.update(names, [10] * len(names), [9.0] * len(names), [False] * len(names))
    round_ = rule.begin(standings(names, limits))
    assert round_.drafts.all()
    return rule, round_, run_of([np.log(chance / (1 - chance))] * 4)


def test_a_draft_ends_where_a_run_goes_on_as_surely() -> None:
    """S (a - c) (1 + c + c^2 + c^3) tokens against a pass, or what one of three requests has to do with it."""
    sure = {}
    for chance in (0.3, 0.5, 0.7, 0.85, 0.95):
        _, round_, run = begun(chance, [8] * 3)
        for num, survival, accept in itertools.product((1, 3), (0.2, 1.0), (0.6, 0.95)):
            gain = survival * (accept - chance) * sum(chance**k for k in range(4))
            sure[chance, num, survival] = round_.outrun(0, [run], survival, accept, num)
            assert sure[chance, num, survival] == (gain < round_.price * 0.02 / num)
    assert set(sure.values()) == {True, False} and not round_.outrun(0, [], 1.0, 0.9, 1)
    round_.price = 0.0
    assert not round_.outrun(0, [run], 1.0, 0.1, 1)


@pytest.mark.parametrize(
    ("verified", "accepted", "drafts_seen", "runs_seen"),
    [(7, 7, (3, 3), (4, 4)), (7, 5, (3, 3), (4, 2)), (7, 3, (3, 3), (4, 0)), (7, 1, (3, 1), (0, 0)),
     (2, 2, (2, 2), (0, 0)), (None, 0, (0, 0), (0, 0))],
)  # fmt: skip
def test_the_draft_and_the_run_behind_it_are_judged_apart(monkeypatch, verified, accepted, drafts_seen, runs_seen):
    rule, round_, run = begun(0.9, [7])
    while round_.running.any():
        round_.step(np.array([0.95]))
        round_.end(round_.lengths >= 3)
    assert round_.lengths.tolist() == [3]
    round_.follow([[run]], np.array([0.9]))
    assert round_.submitted.tolist() == [7] and round_.free.token_ids(0) == run.token_ids
    assert round_.free.accepted[0] == pytest.approx(0.9 * sum(0.9**k for k in range(1, 5)))
    updates = []
    monkeypatch.setattr(rule.acceptance, "update_run", lambda x, won, depth, level: updates.append((depth, won)))
    rule.finish(round_, [verified], [accepted])
    assert updates == [drafts_seen]
    assert (rule.free_runs.candidates["toy"], rule.free_runs.accepted["toy"]) == runs_seen


def test_a_run_behind_a_draft_stays_within_the_limit() -> None:
    _, round_, run = begun(0.95, [4])
    while round_.running.any():
        round_.step(np.array([0.95]))
        round_.end(round_.lengths >= 3)
    round_.follow([[run]], np.array([1.0]))
    assert round_.submitted.tolist() == [4]


@pytest.mark.parametrize("lag", [0, 1])
def test_what_stands_in_front_of_a_run_is_estimated_from_the_scores_of_what_was_submitted(lag: int) -> None:
    """Request 0 drops its third candidate, which it has looked at; request 1 has a broken score; 2 does not draft."""
    rule, round_, _ = begun(0.5, [4, 4, 4], step=0.003)
    rule.lag = lag
    tail = CostAwareTail(SimpleNamespace(lag=lag, needs=frozenset()), 3, 8, 200, "cpu")
    tail._scores.fill_(3.0)  # of a round before
    round_.load(tail.params)
    scores = np.array([[0.95, 0.9, 0.5], [0.9, np.nan, 0.5], [0.02, 0.9, 0.5], [0.02, 0.9, 0.5]])
    survival, lengths, running = torch.ones(3), torch.zeros(3, dtype=torch.int32), torch.ones(3, dtype=torch.int32)
    tail.start(torch.tensor([4, 4, 0], dtype=torch.int32), running)
    for step in range(1, 5):
        given = scores[step - 1 - lag] if step > lag else np.full(3, np.nan)
        tail.append(
            torch.tensor(given, dtype=torch.float32), torch.zeros(3, dtype=torch.int64), step, survival=survival,
            lengths=lengths, running=running, stop_token_ids=torch.zeros(3, 0, dtype=torch.int64),
            draft_tokens=torch.zeros(3, 8, dtype=torch.int64), any_running=torch.zeros(1),
        )  # fmt: skip
        if step == 2:
            assert running.tolist() == [1, 1, 0]
            front, after = tail.standing(survival, step)
            known = [rule.acceptance.accept(logits(scores[:2, row]), np.array([1, 2])) for row in range(3)]
            if lag:  # nothing was seen of candidate 2: it follows from the score of candidate 1
                assert 0 < front[0] < known[0][0] and front[0] / known[0][0] == pytest.approx(float(after[0]), abs=0.1)
            else:
                assert front.tolist()[:2] == pytest.approx([known[row].prod() for row in range(2)], abs=1e-4)
            assert 0.5 < after[0] < 1
    num = lengths.tolist()
    assert num[2] == 0 and num[0] < 4 and num[1] == 4
    for row, length in enumerate(num):
        seen = logits(scores[:length, row])
        if lag and length == 4:
            seen[-1] = np.nan  # its score would have come with the next pass
        wanted = rule.acceptance.accept(seen, np.arange(1, length + 1)).prod()
        assert float(tail.reach(lengths)[row]) == pytest.approx(wanted, abs=1e-4)


def logits(p) -> np.ndarray:
    return np.log(p / (1 - p))
