# SPDX-License-Identifier: Apache-2.0
"""The cost-aware rule behind the adapters' interface: scores in, masks out, outcomes and times back to their round."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.standings import standings
from vllm_specdecpp.decision.cost_aware import CostAwareRule, CostModel
from vllm_specdecpp.decision.cost_aware.tail import CostAwareTail, Report
from vllm_specdecpp.decision.estimator import ConfidenceEstimator, Estimator, HeadEstimator
from vllm_specdecpp.decision.features import StepFeatures
from vllm_specdecpp.decision.round import DraftRound
from vllm_specdecpp.engine.shared.cost_aware import CostAwareDrafting
from vllm_specdecpp.head.model import AcceptanceHead

CURVES = {"first": {1: 1.0, 8: 1.2}, "step": {1: 1.0, 8: 1.2}, "verify": {1: 10.0, 64: 12.0}}


def _rule(**options: Any) -> CostAwareRule:
    return CostAwareRule(CostModel(**CURVES, max_reqs=8, max_tokens=64), 8, **options)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _tail(estimator: Estimator | None = None) -> CostAwareTail:
    return CostAwareTail(estimator or ConfidenceEstimator(), 8, 8, 64, "cpu")


def _begin(rule: CostAwareRule, limits: list[int], estimator: Estimator | None = None, **options: Any) -> DraftRound:
    """A round as an engine begins it."""
    tail = _tail(estimator)
    rule.begin(standings([f"request {i}" for i in range(len(limits))], limits)).load(tail.params)
    return DraftRound(tail, torch.tensor(limits), **options)


def _play(state: DraftRound, scores: torch.Tensor, stop_at: dict[int, int] | None = None) -> list[int]:
    """Draws until all have stopped; ``scores`` [num_steps, num_reqs]; request r draws token 7 at step stop_at[r]."""
    step = 0
    while state.goes_on():
        rows = state.running.nonzero().squeeze(1)
        state.observe(StepFeatures(top1_prob=scores[step, rows]), rows)
        tokens = torch.tensor([7 if (stop_at or {}).get(int(r)) == step else 1 for r in rows], dtype=torch.int64)
        state.append(tokens, rows)
        step += 1
    return state.lengths.tolist()


@pytest.mark.parametrize("seed", range(6))
def test_an_engines_round_is_the_rules(seed: int) -> None:
    """Rows come and go in the adapter; the rule's own steps see all requests. What is reported is what they leave."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(8, 5, generator=generator).sqrt()
    limits = [8, 3, 0, 8, 5]
    state = _begin(_rule(), limits)
    lengths = _play(state, scores)
    round_, filled = (_rule().begin(standings("abcde", limits)) for _ in range(2))
    step = 0
    while round_.running.any():
        round_.step(scores[step].double().numpy())
        step += 1
    assert lengths == round_.lengths.tolist()
    assert lengths[2] == 0 and all(n <= limit for n, limit in zip(lengths, limits, strict=True))
    tail: Any = state.rule
    filled.fill(Report.of(tail.report(state.lengths).numpy(), 5, 8))
    for name in ("lengths", "widths", "drafts", "running"):
        assert np.array_equal(getattr(filled, name), getattr(round_, name)), name
    np.testing.assert_allclose(filled.expected, round_.expected)
    np.testing.assert_array_equal(np.array(filled.scores), np.array(round_.scores))


def test_a_stop_token_ends_a_request_after_it_was_submitted() -> None:
    state = _begin(_rule(), [8, 8], stop_token_ids=torch.tensor([[7], [-1]]))
    assert _play(state, torch.full((8, 2), 0.99), stop_at={0: 2, 1: 3}) == [3, 8]
    assert not state.running.any()


def test_no_draw_without_a_decision() -> None:
    state = _begin(_rule(), [8])
    with pytest.raises(RuntimeError, match="observe"):
        state.append(torch.tensor([1]))


def test_followers_do_as_rank_0_says() -> None:
    """They have no rule; parameters and scores come from rank 0, in the same order of messages."""
    told: list[torch.Tensor] = []

    def lead(tensor: torch.Tensor) -> torch.Tensor:
        told.append(tensor.clone())
        return tensor

    def begin(rule: CostAwareRule | None, agree: Any) -> DraftRound:
        drafting = CostAwareDrafting(rule, _tail(), None, agree, torch.device("cpu"))
        stop_token_ids = torch.tensor([[7]] * 4)
        return drafting.begin(standings("abcd", [8] * 4), {}, stop_token_ids, 3.0)

    scores = torch.rand(8, 4, generator=torch.Generator().manual_seed(1)).sqrt()
    lengths = _play(begin(_rule(), lead), scores, stop_at={1: 1})
    assert len(set(lengths)) > 1
    answers = iter(told)
    # A follower's own numbers are noise; it must not look at them.
    assert _play(begin(None, lambda _: next(answers)), torch.full_like(scores, torch.nan), stop_at={1: 1}) == lengths
    assert next(answers, None) is None


def test_a_lagged_head_scores_the_candidate_before() -> None:
    """The paper's head: what reaches the rule at step k is the score of candidate k - 1."""
    head = AcceptanceHead(3, 1, lag=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.7, generator=generator)
    estimator = HeadEstimator(head.eval())
    state = _begin(_rule(lag=1), [8], estimator)
    hidden = torch.randn(9, 1, 3, generator=generator)
    step = 0
    while state.goes_on():
        state.observe(StepFeatures(hidden[step]))
        state.append(torch.tensor([1]))
        step += 1
    assert step >= 3
    tail: Any = state.rule
    seen = Report.of(tail.report(state.lengths).numpy(), 1, 8).scores
    assert np.isnan(seen[0]).all()
    for k in range(1, step):
        expected = float(estimator(StepFeatures(hidden[k]), k).logit().detach())
        assert float(seen[k]) == pytest.approx(expected, abs=1e-4)


class _Spy(CostAwareRule):
    """Remembers what it was told."""

    def finish(self, round_: Any, verified: Any, accepted: Any, *times: Any) -> None:
        self.told = (round_.request_ids, list(verified), list(accepted), *times)
        super().finish(round_, verified, accepted, *times)


def _drafting() -> tuple[CostAwareDrafting, _Spy]:
    spy = _Spy(CostModel(**CURVES, max_reqs=8, max_tokens=64), 8)
    return CostAwareDrafting(spy, _tail(), None, _same, torch.device("cpu")), spy


def _round(drafting: CostAwareDrafting, ids: str, outcomes: dict[int, tuple[int, int]], **step: Any) -> list[int]:
    by_request = {ids[row]: outcome for row, outcome in outcomes.items()}
    state = drafting.begin(standings(ids, [8] * len(ids)), by_request, None, 3.0)
    lengths = _play(state, torch.full((8, len(ids)), 0.9))
    drafting.timed({"draft_seconds": 2.0, "read": [], **step})
    return lengths


def test_outcomes_and_times_reach_their_round() -> None:
    drafting, spy = _drafting()
    a, b = _round(drafting, "ab", {})
    assert a and b
    _round(drafting, "ba", {0: (b, 1), 1: (a, 0)})  # rows may move
    assert spy.told == (["a", "b"], [a, b], [0, 1], 2.0, 3.0, [])


@pytest.mark.parametrize(
    ("ids", "outcomes"),
    [
        ("abc", {0: (None, 1), 1: (None, 1)}),  # a prompt was in the step
        ("a", {0: (None, 1)}),  # one was aborted, perhaps before it was verified
        ("ab", {0: (1, 1), 1: (None, 1)}),  # the scheduler cut the first one's candidates
    ],
)
def test_times_that_are_not_the_rounds_own_are_left_out(
    ids: str, outcomes: dict[int, tuple[int | None, int]]
) -> None:
    drafting, spy = _drafting()
    lengths = _round(drafting, "ab", {})
    assert min(lengths) > 1
    known = {row: (lengths[row] if n is None else n, accepted) for row, (n, accepted) in outcomes.items()}
    _round(drafting, ids, known)
    assert spy.told[3:] == (2.0, None, [])  # what drafting took is known all the same
    assert spy.told[1] == [known[0][0], known[1][0] if 1 in known else None]


def test_a_round_of_another_rule_teaches_nothing() -> None:
    drafting, spy = _drafting()
    _round(drafting, "a", {})
    drafting.drop_round()
    _round(drafting, "a", {0: (5, 5)})
    assert not hasattr(spy, "told")


def test_what_a_round_read_teaches_what_reading_costs() -> None:
    """Whether the round's candidates were verified as they were drafted or not."""
    drafting, spy = _drafting()
    for outcomes in ({}, {0: (1, 1)}):
        before = spy.costs.read_seconds(40)
        rest = spy.costs.draft_seconds([1]) - spy.costs.read_seconds(2)
        lengths = _round(drafting, "a", {})
        more = rest + (lengths[0] - 1) * spy.costs.step.at(1)
        drafting.timed({"draft_seconds": more + 1.3 * before, "read": [40]})
        _round(drafting, "a", outcomes)
        drafting.drop_round()
        assert before < spy.costs.read_seconds(40) <= 1.3 * before


@pytest.mark.parametrize("measured", [False, True])
def test_what_was_not_timed_is_added_once_and_not_multiplied(measured: bool) -> None:
    """Steps take 4 s more than the passes: what a wider verification adds stays what it was."""
    rule = _rule()
    saved: list[Any] = []
    file: Any = SimpleNamespace(save=lambda *kept: saved.append(kept))
    drafting = CostAwareDrafting(rule, _tail(), file, _same, torch.device("cpu"), measured)
    added = rule.costs.verify.at(40) - rule.costs.verify.at(5)
    outcomes: dict[str, tuple[int, int]] = {}
    num_tokens = 0
    for _ in range(30):
        slow = 4.0 + 10.0 + (num_tokens - 1) * 2.0 / 63
        state = drafting.begin(standings("a", [8]), outcomes, None, slow)
        (length,) = _play(state, torch.full((8, 1), 0.9))
        drafting.timed({"draft_seconds": float(length)})
        outcomes, num_tokens = {"a": (length, length)}, 1 + length
    verify = rule.costs.verify
    assert verify.at(num_tokens) == pytest.approx(slow, rel=0.02)
    assert (verify.at(40) - verify.at(5) == pytest.approx(added, rel=0.03)) is measured
    assert len(saved) == measured  # at once: the next start need not measure again, however this one ends


def test_the_costs_are_saved_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_specdecpp.engine.shared import cost_aware

    monkeypatch.setattr(cost_aware, "SAVE_EVERY", 3)
    saved: list[Any] = []

    class File:
        save = staticmethod(lambda *kept: saved.append(kept))

    drafting, spy = _drafting()
    drafting.file = File()  # type: ignore[assignment]
    (length,) = _round(drafting, "a", {})
    for _ in range(7):
        (length,) = _round(drafting, "a", {0: (length, 1)})
    assert len(saved) == 2 and saved[0][0].keys() == {"first", "step", "verify", "read"}
    drafting.save()
    assert saved[-1] == (spy.costs.points(lasting=True), spy.state())


def test_stats_are_plain_values() -> None:
    import json

    drafting, _ = _drafting()
    (length,) = _round(drafting, "a", {})
    _round(drafting, "a", {0: (length, length)})
    stats = json.loads(json.dumps(drafting.stats()))
    assert stats["admission"]["rho"] > 0 and stats["costs"]["first"]["1"] > 0
    follower = CostAwareDrafting(None, _tail(), None, _same, torch.device("cpu"))
    assert follower.stats() == {}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_what_is_not_the_rules_fault_is_raised(error):
    drafting, _ = _drafting()
    with pytest.raises(error), drafting._guarded():
        raise error("the device's")
    assert not drafting.has_failed
