# SPDX-License-Identifier: Apache-2.0
"""The rounds of the decision core against scalar loops."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from tests.decision_rules import HIDDEN, all_rules
from vllm_specdecpp.config import SpecDecPPConfig
from vllm_specdecpp.decision.estimator import Estimator
from vllm_specdecpp.decision.features import StepFeatures, features_from_logits
from vllm_specdecpp.decision.from_options import make_rule
from vllm_specdecpp.decision.round import DraftRound
from vllm_specdecpp.decision.rules import FixedRule, ThresholdRule, tail_threshold


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Scripted:
    """An estimator that reads its answer from ``top1_prob``, with the paper's lag or without."""

    name = "scripted"
    needs = frozenset({"top1_prob"})

    def __init__(self, lag: int) -> None:
        self.lag = lag

    def __call__(self, features: StepFeatures, position: int) -> Tensor:
        assert features.top1_prob is not None
        return features.top1_prob


def run(
    state: DraftRound, scores: Tensor, tokens: Tensor, *, compact: bool = False
) -> tuple[list[int], list[list[bool]]]:
    """The adapters' loop over scripted scores and tokens, both [num_reqs, num_steps].

    Returns:
        The candidate lengths, and who was running before each step.
    """
    history = []
    step = 0
    while state.goes_on():
        history.append(state.running.bool().tolist())
        rows = state.running.nonzero().squeeze(1) if compact else None
        index = slice(None) if rows is None else rows
        state.observe(StepFeatures(top1_prob=scores[index, step]), index)
        state.append(tokens[index, step], index)
        step += 1
    return state.lengths.tolist(), history


def paper_length(p_hat: list[float], h: float, min_length: int, max_length: int, eos_at: int | None) -> int:
    """The paper's loop, one sequence (the paper: draw Y_k, then score Y_{k-1}); ``p_hat[k - 1]`` scores Y_{k-1}."""
    survival = torch.tensor(1.0)
    for k in range(1, max_length + 1):
        if k > 1:  # Y_0 was verified already
            survival = survival * p_hat[k - 1]
        if k in (eos_at, max_length):
            return k
        if k >= min_length and bool(1 - survival > h):
            return k
    return 0


class TestPapersRule:
    @pytest.mark.parametrize(
        ("h", "min_length", "max_length"),
        [(0.1, 2, 20), (0.3, 1, 20), (0.5, 5, 8), (0.7, 2, 20), (0.9, 7, 7), (0.999, 1, 1)],
    )
    @pytest.mark.parametrize("compact", [False, True])
    def test_equals_a_scalar_loop(self, h: float, min_length: int, max_length: int, compact: bool) -> None:
        num_reqs, eos = 64, 9
        scores = torch.rand(num_reqs, max_length) ** 0.25  # [num_reqs, num_steps], mostly near 1
        tokens = torch.randint(0, 60, (num_reqs, max_length))
        state = DraftRound(
            ThresholdRule(Scripted(lag=1), h),
            torch.full((num_reqs,), max_length),
            min_length=min_length,
            stop_token_ids=torch.tensor([eos]),
        )
        lengths, _ = run(state, scores, tokens, compact=compact)
        expected = []
        for row in range(num_reqs):
            eos_at = next((k for k, token in enumerate(tokens[row].tolist(), 1) if token == eos), None)
            expected.append(paper_length(scores[row].tolist(), h, min_length, max_length, eos_at))
        assert lengths == expected
        if max_length == 20 and 0.1 < h < 0.999:
            assert len(set(lengths)) > 5  # the comparison saw many lengths

    def test_never_fewer_than_two_without_eos(self) -> None:
        state = DraftRound(ThresholdRule(Scripted(lag=1), 0.01), torch.tensor([20]))
        assert run(state, torch.zeros(1, 20), torch.ones(1, 20).long())[0] == [2]

    def test_survival_is_the_product_of_the_scored(self) -> None:
        state = DraftRound(ThresholdRule(Scripted(lag=1), 0.7), torch.tensor([20]))
        run(state, torch.tensor([[0.123, 0.8, 0.6, 0.5, 0.9]]), torch.ones(1, 5).long())
        assert state.lengths.tolist() == [4]  # 1 - 0.8 * 0.6 * 0.5 = 0.76 > 0.7
        assert state.survival.tolist() == pytest.approx([0.24])  # the first score belongs to a verified token

    def test_the_bound_itself_does_not_stop(self) -> None:
        """Strictly greater: 1 - S = h goes on. Powers of two keep the float32 arithmetic exact."""
        state = DraftRound(ThresholdRule(Scripted(lag=0), 0.75), torch.tensor([9]))
        assert run(state, torch.full((1, 9), 0.5), torch.ones(1, 9).long())[0] == [3]


class TestTrainingFree:
    def test_no_lag(self) -> None:
        """The score of the candidate about to be drawn counts at once, so a single candidate is possible."""
        state = DraftRound(ThresholdRule(Scripted(lag=0), 0.5), torch.tensor([9, 9, 9]))
        scores = torch.tensor([[0.4, 1, 1, 1], [0.9, 0.5, 1, 1], [0.9, 0.9, 0.6, 1]])
        assert run(state, scores, torch.ones(3, 4).long())[0] == [1, 2, 3]

    def test_fixed_never_stops(self) -> None:
        rule = make_rule(SpecDecPPConfig(model="d", rule="fixed"), None)
        state = DraftRound(rule, torch.tensor([0, 1, 5, 7]))
        assert run(state, torch.zeros(4, 7), torch.ones(4, 7).long())[0] == [0, 1, 5, 7]
        assert rule.needs == frozenset() and rule.estimator is None


class TestRows:
    @pytest.mark.parametrize("lag", [0, 1])
    @pytest.mark.parametrize("compact", [False, True])
    def test_one_row_never_changes_another(self, lag: int, compact: bool) -> None:
        num_reqs, num_steps = 6, 10
        limits = torch.tensor([10, 3, 10, 0, 10, 7])
        scores = torch.rand(num_reqs, num_steps) ** 0.2
        tokens = torch.randint(0, 12, (num_reqs, num_steps))

        def lengths(rows: list[int], scores: Tensor) -> list[int]:
            state = DraftRound(
                ThresholdRule(Scripted(lag), 0.6), limits[rows], min_length=2, stop_token_ids=torch.tensor([3, 5])
            )
            return run(state, scores[rows], tokens[rows], compact=compact)[0]

        together = lengths(list(range(num_reqs)), scores)
        assert together == [lengths([row], scores)[0] for row in range(num_reqs)]
        for other in range(num_reqs):
            changed = scores.clone()
            changed[other] = 0.0
            now = lengths(list(range(num_reqs)), changed)
            assert [n for row, n in enumerate(now) if row != other] == [
                n for row, n in enumerate(together) if row != other
            ]

    def test_a_stopped_row_submits_nothing_more(self) -> None:
        state = DraftRound(ThresholdRule(Scripted(lag=0), 0.5), torch.tensor([6, 6]))
        scores = torch.tensor([[1.0, 0.1, 0.5, 0.5, 0.5, 0.5], [1, 1, 1, 1, 1, 1]])
        lengths, history = run(state, scores, torch.ones(2, 6).long())
        assert lengths == [2, 6]
        assert [row[0] for row in history] == [True, True, False, False, False, False]
        assert state.survival[0].item() == pytest.approx(0.1)  # later scores no longer count

    def test_no_request_at_all(self) -> None:
        state = DraftRound(FixedRule(), torch.zeros(0, dtype=torch.int64))
        assert not state.goes_on() and state.lengths.tolist() == []

    def test_max_length_zero_drafts_nothing(self) -> None:
        state = DraftRound(FixedRule(), torch.tensor([0, 2]))
        assert state.running.tolist() == [0, 1]
        assert run(state, torch.ones(2, 2), torch.ones(2, 2).long())[0] == [0, 2]

    def test_the_initial_state(self) -> None:
        state = DraftRound(FixedRule(), torch.tensor([3, 0], dtype=torch.int32))
        assert state.survival.tolist() == [1, 1] and state.survival.dtype == torch.float32
        assert state.lengths.tolist() == [0, 0] and state.lengths.dtype == torch.int32


class TestStopTokens:
    @pytest.mark.parametrize("min_length", [1, 4])
    def test_eos_ends_its_row_and_is_submitted(self, min_length: int) -> None:
        tokens = torch.tensor([[1, 7, 1, 1], [1, 1, 1, 1], [8, 1, 1, 1]])
        state = DraftRound(
            FixedRule(), torch.tensor([4, 4, 4]), min_length=min_length, stop_token_ids=torch.tensor([7, 8])
        )
        assert run(state, torch.ones(3, 4), tokens)[0] == [2, 4, 1]

    @pytest.mark.parametrize("compact", [False, True])
    def test_each_request_has_its_own(self, compact: bool) -> None:
        tokens = torch.tensor([[1, 7, 8, 1], [1, 7, 8, 1], [1, 7, 8, 0]])
        state = DraftRound(
            FixedRule(), torch.tensor([4, 4, 4]), stop_token_ids=torch.tensor([[7, 9], [8, -1], [-1, -1]])
        )
        assert run(state, torch.ones(3, 4), tokens, compact=compact)[0] == [2, 3, 4]

    def test_a_stopped_rows_token_is_ignored(self) -> None:
        state = DraftRound(FixedRule(), torch.tensor([1, 3]), stop_token_ids=torch.tensor([7]))
        assert run(state, torch.ones(2, 3), torch.tensor([[1, 7, 7], [1, 1, 1]]))[0] == [1, 3]


class TestBrokenEstimates:
    @pytest.mark.parametrize("h", [0.1, 0.7, 0.999])
    @pytest.mark.parametrize("min_length", [1, 3])
    def test_nan_stops_its_own_row(self, h: float, min_length: int) -> None:
        scores = torch.ones(2, 6)
        scores[0, 0] = math.nan
        state = DraftRound(ThresholdRule(Scripted(lag=0), h), torch.tensor([6, 6]), min_length=min_length)
        assert run(state, scores, torch.ones(2, 6).long())[0] == [min_length, 6]
        assert state.survival.tolist() == [0, 1]

    def test_out_of_range_is_clamped(self) -> None:
        scores = torch.tensor([[2.0, 2, 2, 2], [-1.0, 1, 1, 1], [math.inf, 1, 1, 1], [-math.inf, 1, 1, 1]])
        state = DraftRound(ThresholdRule(Scripted(lag=0), 0.5), torch.full((4,), 4))
        assert run(state, scores, torch.ones(4, 4).long())[0] == [4, 1, 4, 1]
        assert state.survival.tolist() == [1, 0, 1, 0]

    def test_nan_logits_stop_every_rule(self) -> None:
        nan = torch.full((1, 5), math.nan)
        features = features_from_logits(nan, torch.full((1, HIDDEN), math.nan))
        for rule in all_rules():
            if rule.name == "fixed":
                continue
            state = DraftRound(rule, torch.tensor([9]))
            while state.goes_on():
                state.observe(features)
                state.append(torch.tensor([0]))
            assert state.lengths.item() == 1 + (rule.estimator is not None and rule.estimator.lag), rule.name


class EveryOther:
    """A rule with logic of its own: a request stops after its second candidate if its survival is low then."""

    name, depends_on, needs = "every other", "the prefix and Y_1", frozenset({"top1_prob"})

    def __init__(self, estimator: Estimator | None = None) -> None:
        self.estimator = estimator

    def should_stop(self, survival: Tensor, num_drawn: int) -> Tensor:
        return (survival < 0.5) & (num_drawn % 2 == 1)


class TestRuleOfItsOwn:
    def test_the_round_asks_it(self) -> None:
        assert tail_threshold(EveryOther()) is None
        assert all(tail_threshold(rule) is not None for rule in all_rules())
        scores = torch.tensor([[0.1, 1, 1, 1, 1, 1], [0.8, 0.8, 0.7, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
        for min_length, lengths in ((1, [2, 4, 6]), (3, [4, 4, 6]), (5, [6, 6, 6])):
            state = DraftRound(EveryOther(Scripted(lag=0)), torch.tensor([6, 6, 6]), min_length=min_length)
            assert run(state, scores, torch.ones(3, 6).long())[0] == lengths
            assert state.survival.tolist() == pytest.approx([0.1, 0.8 * 0.8 * 0.7, 1.0])
        state = DraftRound(EveryOther(), torch.tensor([3]))
        assert run(state, torch.zeros(1, 3), torch.ones(1, 3).long())[0] == [3]

    def test_a_threshold_rule_that_was_changed_is_asked_too(self) -> None:
        class Never(ThresholdRule):
            def should_stop(self, survival: Tensor, num_drawn: int) -> Tensor:
                return survival > 2

        state = DraftRound(Never(Scripted(lag=0), 0.5), torch.tensor([4]))
        assert tail_threshold(cast(Any, state.rule)) is None
        assert run(state, torch.zeros(1, 4), torch.ones(1, 4).long())[0] == [4]


class TestAgree:
    @pytest.mark.parametrize("rule", [ThresholdRule(Scripted(lag=0), 0.5), EveryOther(Scripted(lag=0))])
    def test_rank_0s_scores_count(self, rule: Any) -> None:
        def rank_0(tensor: Tensor) -> Tensor:
            return torch.tensor([1.0, 0.1]) if tensor.dtype == torch.float32 else tensor

        state = DraftRound(rule, torch.tensor([4, 4]), agree=rank_0)
        # This rank alone would do the opposite.
        assert run(state, torch.tensor([[0.1] * 4, [1.0] * 4]), torch.ones(2, 4).long())[0][0] == 4
        assert state.lengths[1] < 4

    def test_rank_0s_decision_counts_where_the_rule_is_asked(self) -> None:
        def rank_0(tensor: Tensor) -> Tensor:
            return torch.tensor([False, True]) if tensor.dtype == torch.bool else tensor

        state = DraftRound(EveryOther(Scripted(lag=0)), torch.tensor([4, 4]), agree=rank_0)
        assert run(state, torch.tensor([[0.1] * 4, [1.0] * 4]), torch.ones(2, 4).long())[0] == [4, 1]

    def test_append_without_observe(self) -> None:
        state = DraftRound(FixedRule(), torch.tensor([4]))
        with pytest.raises(RuntimeError, match="observe"):
            state.append(torch.tensor([1]))
        state.observe(StepFeatures())
        state.append(torch.tensor([1]))
        with pytest.raises(RuntimeError, match="observe"):
            state.append(torch.tensor([1]))
