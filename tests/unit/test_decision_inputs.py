# SPDX-License-Identifier: Apache-2.0
"""What decisions are made from: features, estimators, and the rules that the options name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.decision_rules import HIDDEN, all_rules
from vllm_specdecpp.config import SpecDecPPConfig
from vllm_specdecpp.decision.estimator import ConfidenceEstimator, EntropyEstimator, HeadEstimator
from vllm_specdecpp.decision.features import SCALAR_FEATURES, StepFeatures, features_from_logits
from vllm_specdecpp.decision.from_options import make_rule
from vllm_specdecpp.decision.rules import ThresholdRule
from vllm_specdecpp.head.model import AcceptanceHead

FLOAT32_TOLERANCE = 1e-5  # a sum over a vocabulary, against float64


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


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

    @pytest.mark.parametrize("scalars", [{"top1_prob"}, {"entropy"}, set(), {"top1_prob", "entropy"}])
    def test_only_what_was_asked_for(self, scalars: set[str]) -> None:
        hidden = torch.randn(2, HIDDEN)
        features = features_from_logits(torch.randn(2, 5), hidden, needs={"hidden_states", *scalars})
        assert {name for name in SCALAR_FEATURES if getattr(features, name) is not None} == scalars
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
            ({"head": "h", "rule": "threshold"}, "threshold", {"hidden_states"}, 1, 0.7),
            ({"head": "h", "threshold": 0.3}, "threshold", {"hidden_states"}, 1, 0.3),
            ({"rule": "confidence"}, "confidence", {"top1_prob"}, 0, 0.5),
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
    def test_the_heads_tuned_threshold(self, options: dict[str, Any], tuned: Any, threshold: float) -> None:
        head = AcceptanceHead(HIDDEN)
        head.metadata["rule"] = tuned
        options = {"model": "d", "head": "h", "rule": "threshold", **options}
        rule = make_rule(SpecDecPPConfig.from_additional_config(options), head)
        assert isinstance(rule, ThresholdRule) and rule.threshold == threshold

    @pytest.mark.parametrize("threshold", [0, 1.0, "0.4", True, None, math.nan])
    def test_a_tuned_threshold_that_is_none(self, threshold: Any) -> None:
        head = AcceptanceHead(HIDDEN)
        head.metadata["rule"] = {"rule": "threshold", "threshold": threshold}
        with pytest.raises(ValueError, match=r"^specdecpp: the head's config.json has rule.threshold=.*tune the head"):
            make_rule(SpecDecPPConfig(model="d", head="h", rule="threshold"), head)

    def test_what_a_head_needs(self) -> None:
        config = SpecDecPPConfig(model="d", head="h", rule="threshold")
        head = AcceptanceHead(HIDDEN, features=["entropy", "margin"], lag=0)
        assert make_rule(config, head).needs == {"hidden_states", "entropy", "margin"}

    @pytest.mark.parametrize("threshold", [0.0, 1.0, -1.0, 2.0, math.nan])
    def test_threshold_out_of_range(self, threshold: float) -> None:
        with pytest.raises(ValueError, match="must lie strictly between 0 and 1"):
            ThresholdRule(ConfidenceEstimator(), threshold)

    def test_every_rule_states_its_dependencies(self) -> None:
        for rule in all_rules():
            assert rule.depends_on and "Y_k " not in rule.depends_on
