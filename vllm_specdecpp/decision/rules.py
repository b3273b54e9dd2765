# SPDX-License-Identifier: Apache-2.0
"""Stop rules: when a request's drafting ends. Each states the random variables it depends on.

Lossless means that whether token j is submitted may depend on the prefix and Y_1..Y_{j-1}, never on Y_j or later. The
rule is asked before candidate k exists and answers for candidate k+1, so it has no way to look.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from vllm_specdecpp.decision.estimator import ConfidenceEstimator, Estimator, HeadEstimator

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


NEVER = 2.0
"""A threshold above every 1 - survival."""


def tail_threshold(rule: StopRule) -> float | None:
    """The h at which ``tails.threshold_tail`` decides as the rule does; None: it has logic of its own, which only the
    host can ask."""
    decides = type(rule).should_stop
    if decides is ThresholdRule.should_stop and isinstance(rule, ThresholdRule):
        return rule.threshold
    return NEVER if decides is FixedRule.should_stop else None


def make_estimator(head: AcceptanceHead | None) -> Estimator:
    """Whose scores the cost-aware rule reads: the head's, else the draft's top-1 probability."""
    return ConfidenceEstimator() if head is None else HeadEstimator(head)
