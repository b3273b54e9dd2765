# SPDX-License-Identifier: Apache-2.0
"""Stop rules: when a request's drafting ends. Each states the random variables it depends on.

Lossless means that whether token j is submitted may depend on the prefix and Y_1..Y_{j-1}, never on Y_j or later. The
rule is asked before candidate k exists and answers for candidate k+1, so it has no way to look.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from vllm_specdecpp.config import SpecDecPPConfig
from vllm_specdecpp.decision.estimator import ConfidenceEstimator, EntropyEstimator, Estimator, HeadEstimator

if TYPE_CHECKING:  # the head imports this package's features
    from vllm_specdecpp.head.model import AcceptanceHead


class StopRule(Protocol):
    """Decides, before candidate ``num_drawn + 1`` is drawn, whether it is the last one of its request."""

    name: str
    depends_on: str
    """The random variables that the decision about candidate k+1 is a function of."""
    estimator: Estimator | None
    needs: frozenset[str]
    """Fields of :class:`StepFeatures` that the rule's estimator reads."""

    def should_stop(self, survival: Tensor, num_drawn: int) -> Tensor:
        """Whether drafting ends after the next candidate.

        Args:
            survival: [num_reqs] float32, estimated probability that all candidates scored so far are accepted.
            num_drawn: candidates drawn so far in the round.

        Returns:
            [num_reqs] bool.
        """


class FixedRule:
    """Never stops: every round has the upper bound's length, as in plain speculative decoding."""

    name = "fixed"
    depends_on = "nothing"
    estimator: Estimator | None = None
    needs: frozenset[str] = frozenset()

    def should_stop(self, survival: Tensor, num_drawn: int) -> Tensor:
        return torch.zeros_like(survival, dtype=torch.bool)  # [num_reqs]


class ThresholdRule:
    """Stops once 1 - S > h: the estimated probability that some candidate is rejected exceeds h (the paper's theorem).

    With :class:`HeadEstimator` this is the paper's rule; with the others its training-free form.

    Args:
        estimator: where the acceptance estimates come from.
        threshold: h, strictly between 0 and 1.
    """

    def __init__(self, estimator: Estimator, threshold: float, name: str | None = None) -> None:
        if not 0 < threshold < 1:
            raise ValueError(f"specdecpp: threshold={threshold} must lie strictly between 0 and 1 (e.g. 0.7)")
        self.name = name or estimator.name
        self.estimator: Estimator | None = estimator
        self.needs = estimator.needs
        self.threshold = threshold
        self.depends_on = "the prefix and Y_1..Y_{k-1}, through the draft's passes that read them"

    def should_stop(self, survival: Tensor, num_drawn: int) -> Tensor:
        return 1 - survival > self.threshold  # [num_reqs]


def make_estimator(head: AcceptanceHead | None) -> Estimator:
    """Whose scores the cost-aware rule reads: the head's, else the draft's top-1 probability."""
    return ConfidenceEstimator() if head is None else HeadEstimator(head)


def make_rule(config: SpecDecPPConfig, head: AcceptanceHead | None) -> StopRule:
    """The threshold rule, or none, that the options ask for; the cost-aware rule is made by the engine, with its costs.

    A threshold that they leave out is the head's tuned one, if it has one.

    Raises:
        ValueError: the rule needs a head and none is loaded, or the head's own threshold is not one.
    """
    rule, threshold = config.resolved_rule, config.resolved_threshold
    if rule == "fixed":
        return FixedRule()
    if threshold is None:
        raise ValueError(f"specdecpp: rule={rule!r} is no threshold rule; it is made with the engine's costs")
    if rule == "threshold":
        if head is None:
            raise ValueError("specdecpp: rule='threshold' needs an acceptance head and none is loaded; give head=...")
        if config.threshold is None:
            threshold = _tuned_threshold(head, threshold)
        return ThresholdRule(HeadEstimator(head), threshold, name=rule)
    estimator: Estimator = ConfidenceEstimator() if rule == "confidence" else EntropyEstimator()
    return ThresholdRule(estimator, threshold, name=rule)


def _tuned_threshold(head: AcceptanceHead, default: float) -> float:
    """The ``threshold`` of the rule in the head's config, as ``vllm-specdecpp tune`` writes it, else ``default``."""
    tuned: Any = head.metadata.get("rule")
    if not isinstance(tuned, dict) or tuned.get("rule") != "threshold":
        return default
    threshold = tuned.get("threshold", default)
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 < threshold < 1:
        raise ValueError(
            f"specdecpp: the head's config.json has rule.threshold={threshold!r}, which must lie strictly between 0 "
            "and 1; tune the head again, or give threshold="
        )
    return float(threshold)
