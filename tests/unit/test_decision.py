# SPDX-License-Identifier: Apache-2.0
"""The decision core against scalar loops, and its losslessness by exact enumeration."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_specdecpp.config import SpecDecPPConfig
from vllm_specdecpp.decision import (
    SCALAR_FEATURES,
    ConfidenceEstimator,
    EntropyEstimator,
    FixedRule,
    HeadEstimator,
    RoundState,
    StepFeatures,
    StopRule,
    ThresholdRule,
    features_from_logits,
    make_rule,
)
from vllm_specdecpp.head import AcceptanceHead

HIDDEN = 4
FLOAT32_TOLERANCE = 1e-5  # a sum over a vocabulary, against float64


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
    state: RoundState, scores: Tensor, tokens: Tensor, *, compact: bool = False
) -> tuple[list[int], list[list[bool]]]:
    """The adapters' loop over scripted scores and tokens, both [num_reqs, num_steps].

    Returns:
        The candidate lengths, and who was running before each step.
    """
    history = []
    step = 0
    while state.any_running():
        history.append(state.running.tolist())
        rows = state.running.nonzero().squeeze(1) if compact else None
        index = slice(None) if rows is None else rows
        state.observe(StepFeatures(top1_prob=scores[index, step]), rows)
        state.append(tokens[index, step], rows)
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
    @pytest.mark.parametrize("h", [0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
    @pytest.mark.parametrize(("min_length", "max_length"), [(1, 1), (1, 20), (2, 20), (5, 8), (7, 7)])
    @pytest.mark.parametrize("compact", [False, True])
    def test_equals_a_scalar_loop(self, h: float, min_length: int, max_length: int, compact: bool) -> None:
        num_reqs, eos = 64, 9
        scores = torch.rand(num_reqs, max_length) ** 0.25  # [num_reqs, num_steps], mostly near 1
        tokens = torch.randint(0, 60, (num_reqs, max_length))
        state = RoundState(
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
        state = RoundState(ThresholdRule(Scripted(lag=1), 0.01), torch.tensor([20]))
        assert run(state, torch.zeros(1, 20), torch.ones(1, 20).long())[0] == [2]

    def test_survival_is_the_product_of_the_scored(self) -> None:
        state = RoundState(ThresholdRule(Scripted(lag=1), 0.7), torch.tensor([20]))
        run(state, torch.tensor([[0.123, 0.8, 0.6, 0.5, 0.9]]), torch.ones(1, 5).long())
        assert state.lengths.tolist() == [4]  # 1 - 0.8 * 0.6 * 0.5 = 0.76 > 0.7
        assert state.survival.tolist() == pytest.approx([0.24])  # the first score belongs to a verified token

    def test_the_bound_itself_does_not_stop(self) -> None:
        """Strictly greater: 1 - S = h goes on. Powers of two keep the float32 arithmetic exact."""
        state = RoundState(ThresholdRule(Scripted(lag=0), 0.75), torch.tensor([9]))
        assert run(state, torch.full((1, 9), 0.5), torch.ones(1, 9).long())[0] == [3]


class TestTrainingFree:
    def test_no_lag(self) -> None:
        """The score of the candidate about to be drawn counts at once, so a single candidate is possible."""
        state = RoundState(ThresholdRule(Scripted(lag=0), 0.5), torch.tensor([9, 9, 9]))
        scores = torch.tensor([[0.4, 1, 1, 1], [0.9, 0.5, 1, 1], [0.9, 0.9, 0.6, 1]])
        assert run(state, scores, torch.ones(3, 4).long())[0] == [1, 2, 3]

    def test_fixed_never_stops(self) -> None:
        rule = make_rule(SpecDecPPConfig(model="d", rule="fixed"), None)
        state = RoundState(rule, torch.tensor([0, 1, 5, 7]))
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
            state = RoundState(
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
        state = RoundState(ThresholdRule(Scripted(lag=0), 0.5), torch.tensor([6, 6]))
        scores = torch.tensor([[1.0, 0.1, 0.5, 0.5, 0.5, 0.5], [1, 1, 1, 1, 1, 1]])
        lengths, history = run(state, scores, torch.ones(2, 6).long())
        assert lengths == [2, 6]
        assert [row[0] for row in history] == [True, True, False, False, False, False]
        assert state.survival[0].item() == pytest.approx(0.1)  # later scores no longer count

    def test_no_request_at_all(self) -> None:
        state = RoundState(FixedRule(), torch.zeros(0, dtype=torch.int64))
        assert not state.any_running() and state.lengths.tolist() == []

    def test_max_length_zero_drafts_nothing(self) -> None:
        state = RoundState(FixedRule(), torch.tensor([0, 2]))
        assert state.running.tolist() == [False, True]
        assert run(state, torch.ones(2, 2), torch.ones(2, 2).long())[0] == [0, 2]

    def test_the_initial_state(self) -> None:
        state = RoundState(FixedRule(), torch.tensor([3, 0], dtype=torch.int32))
        assert state.survival.tolist() == [1, 1] and state.survival.dtype == torch.float32
        assert state.lengths.tolist() == [0, 0] and state.lengths.dtype == torch.int64


class TestStopTokens:
    @pytest.mark.parametrize("min_length", [1, 4])
    def test_eos_ends_its_row_and_is_submitted(self, min_length: int) -> None:
        tokens = torch.tensor([[1, 7, 1, 1], [1, 1, 1, 1], [8, 1, 1, 1]])
        state = RoundState(
            FixedRule(), torch.tensor([4, 4, 4]), min_length=min_length, stop_token_ids=torch.tensor([7, 8])
        )
        assert run(state, torch.ones(3, 4), tokens)[0] == [2, 4, 1]

    @pytest.mark.parametrize("compact", [False, True])
    def test_each_request_has_its_own(self, compact: bool) -> None:
        tokens = torch.tensor([[1, 7, 8, 1], [1, 7, 8, 1], [1, 7, 8, 0]])
        state = RoundState(
            FixedRule(), torch.tensor([4, 4, 4]), stop_token_ids=torch.tensor([[7, 9], [8, -1], [-1, -1]])
        )
        assert run(state, torch.ones(3, 4), tokens, compact=compact)[0] == [2, 3, 4]

    def test_a_stopped_rows_token_is_ignored(self) -> None:
        state = RoundState(FixedRule(), torch.tensor([1, 3]), stop_token_ids=torch.tensor([7]))
        assert run(state, torch.ones(2, 3), torch.tensor([[1, 7, 7], [1, 1, 1]]))[0] == [1, 3]


class TestBrokenEstimates:
    @pytest.mark.parametrize("h", [0.1, 0.7, 0.999])
    @pytest.mark.parametrize("min_length", [1, 3])
    def test_nan_stops_its_own_row(self, h: float, min_length: int) -> None:
        scores = torch.ones(2, 6)
        scores[0, 0] = math.nan
        state = RoundState(ThresholdRule(Scripted(lag=0), h), torch.tensor([6, 6]), min_length=min_length)
        assert run(state, scores, torch.ones(2, 6).long())[0] == [min_length, 6]
        assert state.survival.tolist() == [0, 1]

    def test_out_of_range_is_clamped(self) -> None:
        scores = torch.tensor([[2.0, 2, 2, 2], [-1.0, 1, 1, 1], [math.inf, 1, 1, 1], [-math.inf, 1, 1, 1]])
        state = RoundState(ThresholdRule(Scripted(lag=0), 0.5), torch.full((4,), 4))
        assert run(state, scores, torch.ones(4, 4).long())[0] == [4, 1, 4, 1]
        assert state.survival.tolist() == [1, 0, 1, 0]

    def test_nan_logits_stop_every_rule(self) -> None:
        nan = torch.full((1, 5), math.nan)
        features = features_from_logits(nan, torch.full((1, HIDDEN), math.nan), margin=True)
        for rule in all_rules():
            if rule.name == "fixed":
                continue
            state = RoundState(rule, torch.tensor([9]))
            while state.any_running():
                state.observe(features)
                state.append(torch.tensor([0]), drawn_logprobs=nan[:, 0])
            assert state.lengths.item() == 1 + (rule.estimator is not None and rule.estimator.lag), rule.name


class TestAgree:
    def test_the_agreed_decision_counts(self) -> None:
        seen: list[Tensor] = []

        def rank_0(decision: Tensor) -> Tensor:
            seen.append(decision)
            return torch.tensor([len(seen) == 2, False])

        state = RoundState(ThresholdRule(Scripted(lag=0), 0.5), torch.tensor([4, 4]), agree=rank_0)
        assert run(state, torch.zeros(2, 4), torch.ones(2, 4).long())[0] == [2, 4]
        assert [decision.dtype for decision in seen] == [torch.bool] * 4
        assert seen[0].tolist() == [True, True]  # this rank alone would have stopped at once

    def test_append_without_observe(self) -> None:
        state = RoundState(FixedRule(), torch.tensor([4]))
        with pytest.raises(RuntimeError, match="observe"):
            state.append(torch.tensor([1]))
        state.observe(StepFeatures())
        state.append(torch.tensor([1]))
        with pytest.raises(RuntimeError, match="observe"):
            state.append(torch.tensor([1]))


class TestFeatures:
    @pytest.mark.parametrize("vocab", [1, 2, 5, 1000, 151_936])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_against_float64(self, vocab: int, dtype: torch.dtype) -> None:
        logits = (torch.randn(3, vocab) * 4).to(dtype)
        features = features_from_logits(logits)
        p = logits.double().softmax(-1)
        assert features.top1_prob is not None and features.entropy is not None
        assert features.top1_prob.dtype == features.entropy.dtype == torch.float32
        torch.testing.assert_close(features.top1_prob.double(), p.amax(-1), atol=FLOAT32_TOLERANCE, rtol=1e-4)
        torch.testing.assert_close(
            features.entropy.double(), -(p * p.clamp_min(1e-300).log()).sum(-1), atol=FLOAT32_TOLERANCE, rtol=1e-4
        )

    def test_saturated_and_masked_logits(self) -> None:
        inf = math.inf
        features = features_from_logits(torch.tensor([[1e4, 0, 0], [0, 0, -inf], [-inf, 3, -inf], [-1e4, -1e4, -1e4]]))
        assert features.top1_prob is not None and features.entropy is not None
        assert features.top1_prob.tolist() == pytest.approx([1, 0.5, 1, 1 / 3])
        assert features.entropy.tolist() == pytest.approx([0, math.log(2), 0, math.log(3)])

    @pytest.mark.parametrize(("top1", "entropy"), [(True, False), (False, True), (False, False), (True, True)])
    def test_only_what_was_asked_for(self, top1: bool, entropy: bool) -> None:
        hidden = torch.randn(2, HIDDEN)
        features = features_from_logits(torch.randn(2, 5), hidden, top1=top1, entropy=entropy)
        assert (features.top1_prob is not None, features.entropy is not None) == (top1, entropy)
        assert features.hidden_states is hidden

    def test_the_logits_are_left_alone(self) -> None:
        logits = torch.randn(2, 5)
        before = logits.clone()
        features_from_logits(logits)
        assert torch.equal(logits, before)


class TestEstimators:
    def test_what_they_compute(self) -> None:
        head = AcceptanceHead(HIDDEN)
        features = features_from_logits(torch.randn(3, 7), torch.randn(3, HIDDEN))
        assert features.hidden_states is not None and features.entropy is not None
        assert torch.equal(HeadEstimator(head)(features, 1), head.probability(features.hidden_states))
        assert ConfidenceEstimator()(features, 1) is features.top1_prob
        torch.testing.assert_close(EntropyEstimator()(features, 1), 1 / features.entropy.exp())

    def test_the_inverse_perplexity_of_a_uniform_choice(self) -> None:
        features = features_from_logits(torch.zeros(1, 8))
        assert EntropyEstimator()(features, 1).item() == pytest.approx(1 / 8)

    def test_a_feature_that_is_missing_is_named(self) -> None:
        estimators = (HeadEstimator(AcceptanceHead(HIDDEN)), ConfidenceEstimator(), EntropyEstimator())
        for estimator in estimators:
            (field,) = estimator.needs
            with pytest.raises(ValueError, match=f"reads features.{field}, but the draft step did not compute it"):
                estimator(StepFeatures(), 1)


class TestMakeRule:
    @pytest.mark.parametrize(
        ("options", "name", "needs", "lag", "threshold"),
        [
            ({"head": "h"}, "threshold", {"hidden_states"}, 1, 0.7),
            ({"head": "h", "threshold": 0.3}, "threshold", {"hidden_states"}, 1, 0.3),
            ({}, "confidence", {"top1_prob"}, 0, 0.5),
            ({"rule": "entropy", "threshold": 0.9}, "entropy", {"entropy"}, 0, 0.9),
        ],
    )
    def test_threshold_rules(
        self, options: dict[str, str | float], name: str, needs: set[str], lag: int, threshold: float
    ) -> None:
        config = SpecDecPPConfig.from_additional_config({"model": "d", **options})
        rule = make_rule(config, AcceptanceHead(HIDDEN) if "head" in options else None)
        assert isinstance(rule, ThresholdRule) and rule.estimator is not None
        assert (rule.name, rule.needs, rule.estimator.lag, rule.threshold) == (name, needs, lag, threshold)

    @pytest.mark.parametrize(
        ("options", "tuned", "threshold"),
        [
            ({}, {"rule": "threshold", "threshold": 0.4, "num_speculative_tokens": 9}, 0.4),
            ({"threshold": 0.3}, {"rule": "threshold", "threshold": 0.4}, 0.3),  # the user's word comes first
            ({}, {"rule": "confidence", "threshold": 0.4}, 0.7),  # of another rule
            ({}, {"rule": "threshold"}, 0.7),
            ({}, "text", 0.7),
        ],
    )  # fmt: skip
    def test_the_heads_tuned_threshold(self, options: dict[str, float], tuned: Any, threshold: float) -> None:
        head = AcceptanceHead(HIDDEN)
        head.metadata["rule"] = tuned
        rule = make_rule(SpecDecPPConfig.from_additional_config({"model": "d", "head": "h", **options}), head)
        assert isinstance(rule, ThresholdRule) and rule.threshold == threshold

    @pytest.mark.parametrize("threshold", [0, 1.0, "0.4", True, None, math.nan])
    def test_a_tuned_threshold_that_is_none(self, threshold: Any) -> None:
        head = AcceptanceHead(HIDDEN)
        head.metadata["rule"] = {"rule": "threshold", "threshold": threshold}
        with pytest.raises(ValueError, match=r"^specdecpp: the head's config.json has rule.threshold=.*tune the head"):
            make_rule(SpecDecPPConfig(model="d", head="h"), head)

    def test_what_a_head_needs(self) -> None:
        config = SpecDecPPConfig(model="d", head="h")
        head = AcceptanceHead(HIDDEN, features=["entropy", "drawn_logprob"])
        assert make_rule(config, head).needs == {"hidden_states", "entropy", "drawn_logprob"}

    def test_a_head_that_is_not_loaded(self) -> None:
        with pytest.raises(ValueError, match="rule='threshold' needs an acceptance head and none is loaded"):
            make_rule(SpecDecPPConfig(model="d", head="h"), None)

    @pytest.mark.parametrize("threshold", [0.0, 1.0, -1.0, 2.0, math.nan])
    def test_threshold_out_of_range(self, threshold: float) -> None:
        with pytest.raises(ValueError, match="must lie strictly between 0 and 1"):
            ThresholdRule(ConfidenceEstimator(), threshold)

    def test_every_rule_states_its_dependencies(self) -> None:
        for rule in all_rules():
            assert rule.depends_on and "Y_k " not in rule.depends_on


RULES = ["fixed", "head", "confidence", "entropy", "head with scalars", "look-ahead head"]


def all_rules(threshold: float = 0.5) -> list[StopRule]:
    """One of each, in the order of ``RULES``. The seeds give every length at every threshold."""

    def head(seed: int = 3, **options: Any) -> HeadEstimator:
        head = AcceptanceHead(HIDDEN, **options)
        generator = torch.Generator().manual_seed(seed)
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=0.8, generator=generator)
        return HeadEstimator(head)

    estimators = (
        head(), ConfidenceEstimator(), EntropyEstimator(),
        head(34, features=SCALAR_FEATURES), head(34, features=SCALAR_FEATURES[:3], lag=0),
    )  # fmt: skip
    return [FixedRule(), *(ThresholdRule(estimator, threshold) for estimator in estimators)]


# A target and a draft with one token of memory over three outcomes, and everything that a round can do, enumerated.

VOCAB, K_MAX = 3, 3
TARGET = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.3, 0.65, 0.05]], dtype=torch.float64)  # p(next | last)
DRAFT = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.1, 0.8], [0.34, 0.33, 0.33]], dtype=torch.float64)  # q(next | last)
STATES = torch.tensor([[1.0, 0, 0.5, 0], [0, 1, 0, -0.5], [-1, 0, 1, 0.3]])  # the draft's hidden state after a token
ENUMERATION_TOLERANCE = 1e-12  # float64 sums of a few hundred terms
NUM_EMITTED = 4  # how many tokens of the emitted text are compared: at least two rounds

DRAWS = torch.tensor(list(itertools.product(range(VOCAB), repeat=K_MAX)))  # [27, K_MAX] every Y_1..Y_3
MakeRound = Callable[[int], RoundState]
Law = dict[tuple[int, ...], float]


def draft_round(state: RoundState, prefix: int, draft: Tensor) -> Tensor:
    """Runs one round per row of DRAWS after the token ``prefix``; returns the candidate lengths: [27]."""
    last = torch.full((len(DRAWS),), prefix)
    step = 0
    while state.any_running():
        # The pass that has read Y_{k-1}.
        features = features_from_logits(draft[last].log(), STATES[last], margin=True)
        state.observe(features)
        state.append(DRAWS[:, step], drawn_logprobs=draft[last, DRAWS[:, step]].log())
        last = DRAWS[:, step]
        step += 1
    return state.lengths


def emitted_law(make_round: MakeRound, draft: Tensor = DRAFT, start: int = 0) -> Law:
    """The exact law of the first tokens emitted after ``start``, with standard rejection sampling."""

    @cache
    def rounds(prefix: int) -> tuple[tuple[tuple[int, ...], float], ...]:
        """What one round emits, and how likely."""
        out: Law = {}
        lengths = draft_round(make_round(len(DRAWS)), prefix, draft).tolist()
        for draws, length in zip(DRAWS.tolist(), lengths, strict=True):
            path = [prefix, *draws]
            weight = math.prod(draft[a, b].item() for a, b in itertools.pairwise(path))
            if weight == 0:
                continue
            reached = 1.0  # P(all candidates so far are accepted | draws)
            for k in range(1, length + 1):
                p, q = TARGET[path[k - 1]], draft[path[k - 1]]
                accept = min(1.0, (p[path[k]] / q[path[k]]).item())
                recovered = (p - q).clamp_min(0)
                for token in range(VOCAB):
                    if accept < 1:
                        share = reached * (1 - accept) * (recovered[token] / recovered.sum()).item()
                        key = (*path[1:k], token)
                        out[key] = out.get(key, 0.0) + weight * share
                reached *= accept
            for token in range(VOCAB):  # the bonus token
                key = (*path[1 : length + 1], token)
                out[key] = out.get(key, 0.0) + weight * reached * TARGET[path[length], token].item()
        return tuple(out.items())

    @cache
    def law(prefix: int, num_tokens: int) -> tuple[tuple[tuple[int, ...], float], ...]:
        if num_tokens <= 0:
            return (((), 1.0),)
        out: Law = {}
        for emitted, weight in rounds(prefix):
            for rest, share in law(emitted[-1], num_tokens - len(emitted)):
                key = (emitted + rest)[:num_tokens]
                out[key] = out.get(key, 0.0) + weight * share
        return tuple(out.items())

    return dict(law(start, NUM_EMITTED))


def largest_error(law: Law, start: int = 0) -> float:
    """Against the target's own law."""
    assert sum(law.values()) == pytest.approx(1, abs=ENUMERATION_TOLERANCE)
    errors = []
    for text in itertools.product(range(VOCAB), repeat=NUM_EMITTED):
        exact = math.prod(TARGET[a, b].item() for a, b in itertools.pairwise([start, *text]))
        errors.append(abs(law.get(text, 0.0) - exact))
    return max(errors)


class DropsUnlikelyTokens(RoundState):
    """Planted bias: a drawn token is not submitted when its own draft probability is low."""

    def __init__(self, num_reqs: int, draft: Tensor) -> None:
        super().__init__(FixedRule(), torch.full((num_reqs,), K_MAX))
        self.draft = draft
        self.last: Tensor | None = None

    def observe(self, features: StepFeatures, rows: Tensor | None = None) -> None:
        super().observe(features, rows)
        assert features.hidden_states is not None
        self.last = (features.hidden_states[:, None] == STATES).all(-1).long().argmax(-1)  # [num_reqs] the token read

    def append(self, token_ids: Tensor, rows: Tensor | None = None, drawn_logprobs: Tensor | None = None) -> None:
        dropped = self.running & (self.draft[self.last, token_ids] < 0.5)  # [num_reqs]
        super().append(token_ids, rows, drawn_logprobs)
        self.lengths = self.lengths - dropped.long()
        self.running = self.running & ~dropped


class LooksAtTheDrawnToken(RoundState):
    """Planted bias: the likely first token stops the draft before it, so only unlikely ones are verified."""

    def append(self, token_ids: Tensor, rows: Tensor | None = None, drawn_logprobs: Tensor | None = None) -> None:
        super().append(token_ids, rows, drawn_logprobs)
        dropped = (token_ids == 0) & (self.lengths == 1)  # [num_reqs]
        self.lengths = torch.where(dropped, 0, self.lengths)
        self.running = self.running & ~dropped


class ReadsTheDrawnProbability(RoundState):
    """Planted bias: log q(Y_k) decides whether Y_k itself is submitted, where only log q(Y_{k-1}) may."""

    def append(self, token_ids: Tensor, rows: Tensor | None = None, drawn_logprobs: Tensor | None = None) -> None:
        super().append(token_ids, rows, drawn_logprobs)
        assert drawn_logprobs is not None
        dropped = (drawn_logprobs.exp() > 0.4) & (self.lengths == 1)  # [num_reqs]
        self.lengths = torch.where(dropped, 0, self.lengths)
        self.running = self.running & ~dropped


class TestLossless:
    @pytest.mark.parametrize("index", range(6), ids=RULES)
    @pytest.mark.parametrize("h", [0.3, 0.5, 0.6, 0.8])
    @pytest.mark.parametrize("min_length", [1, 2])
    @pytest.mark.parametrize("eos", [None, 1])
    @pytest.mark.parametrize("start", range(VOCAB))
    def test_the_emitted_law_is_the_targets(
        self, index: int, h: float, min_length: int, eos: int | None, start: int
    ) -> None:
        def make_round(num_reqs: int) -> RoundState:
            return RoundState(
                all_rules(h)[index],
                torch.full((num_reqs,), K_MAX),
                min_length=min_length,
                stop_token_ids=None if eos is None else torch.tensor([eos]),
            )

        assert largest_error(emitted_law(make_round, start=start), start) < ENUMERATION_TOLERANCE

    @pytest.mark.parametrize("index", range(1, 6), ids=RULES[1:])
    def test_the_enumeration_sees_different_lengths(self, index: int) -> None:
        """Else the law would prove nothing about the rule."""
        seen: set[int] = set()
        for h in (0.3, 0.5, 0.6, 0.8):
            for prefix in range(VOCAB):
                state = RoundState(all_rules(h)[index], torch.full((len(DRAWS),), K_MAX))
                seen |= set(draft_round(state, prefix, DRAFT).tolist())
        assert seen == ({2, 3} if index in (1, 4) else {1, 2, 3})

    def test_dropping_a_token_for_its_own_value_is_caught(self) -> None:
        law = emitted_law(lambda num_reqs: DropsUnlikelyTokens(num_reqs, DRAFT))
        assert largest_error(law) > 0.01

    def test_stopping_before_a_token_for_its_own_value_is_caught(self) -> None:
        law = emitted_law(lambda num_reqs: LooksAtTheDrawnToken(FixedRule(), torch.full((num_reqs,), K_MAX)))
        assert largest_error(law) > 0.01

    def test_stopping_before_a_token_for_its_own_probability_is_caught(self) -> None:
        law = emitted_law(lambda num_reqs: ReadsTheDrawnProbability(FixedRule(), torch.full((num_reqs,), K_MAX)))
        assert largest_error(law) > 0.01

    def test_with_one_hot_drafting_even_dropping_is_exact(self) -> None:
        """A greedy draft's token is a function of the prefix, so it carries no information of its own."""
        one_hot = torch.nn.functional.one_hot(DRAFT.argmax(-1), VOCAB).double()
        law = emitted_law(lambda num_reqs: DropsUnlikelyTokens(num_reqs, one_hot), draft=one_hot)
        assert largest_error(law) < ENUMERATION_TOLERANCE

    @pytest.mark.parametrize("index", range(6), ids=RULES)
    @pytest.mark.parametrize("step", range(6))
    def test_the_decision_ignores_the_tokens_it_is_about(self, index: int, step: int) -> None:
        """Whether candidate k+1 is drawn is the same whatever Y_k is; its features come from Y_{k-1} and before."""
        num_reqs, num_steps = 32, 6
        logits = torch.randn(num_steps, num_reqs, 9) * 5
        hidden = torch.randn(num_steps, num_reqs, HIDDEN)

        def decisions(tokens: Tensor) -> list[list[bool]]:
            state = RoundState(all_rules()[index], torch.full((num_reqs,), num_steps))
            out = []
            for k in range(step + 1):
                state.observe(features_from_logits(logits[k], hidden[k], margin=True))
                drawn_logprobs = logits[k].log_softmax(-1).gather(1, tokens[k][:, None]).squeeze(1)
                state.append(tokens[k], drawn_logprobs=drawn_logprobs)
                out.append(state.running.tolist())
            return out

        tokens = torch.randint(0, 9, (num_steps, num_reqs))
        other = tokens.clone()
        other[step] = (other[step] + 1 + torch.randint(0, 8, (num_reqs,))) % 9
        assert decisions(tokens) == decisions(other)


def test_the_core_imports_no_vllm() -> None:
    code = "import sys, vllm_specdecpp.decision; print('vllm' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
