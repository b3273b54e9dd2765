# SPDX-License-Identifier: Apache-2.0
"""One of each stop rule, with random heads."""

from __future__ import annotations

from typing import Any

import torch

from vllm_specdecpp.decision.estimator import ConfidenceEstimator, EntropyEstimator, HeadEstimator
from vllm_specdecpp.decision.features import SCALAR_FEATURES
from vllm_specdecpp.decision.rules import FixedRule, StopRule, ThresholdRule
from vllm_specdecpp.head.model import AcceptanceHead

HIDDEN = 4
RULES = ["fixed", "head", "confidence", "entropy", "look-ahead head"]


def all_rules(threshold: float = 0.5) -> list[StopRule]:
    """One of each, in the order of ``RULES``. The seeds give every length at every threshold."""

    def head(seed: int = 3, **options: Any) -> HeadEstimator:
        head = AcceptanceHead(HIDDEN, **options)
        generator = torch.Generator().manual_seed(seed)
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=0.8, generator=generator)
        return HeadEstimator(head)

    ahead = head(34, features=SCALAR_FEATURES, lag=0)
    estimators = head(), ConfidenceEstimator(), EntropyEstimator(), ahead
    return [FixedRule(), *(ThresholdRule(estimator, threshold) for estimator in estimators)]
