# SPDX-License-Identifier: Apache-2.0
"""How long to draft: pure torch, batched over requests, no vLLM import.

One loop serves every adapter::

    state = DraftRound(rule, max_lengths)  # from make_rule, or a CostAwareTail with its parameters loaded
    while state.goes_on():
        features = ...            # the draft's forward pass
        state.observe(features)   # what is decided by is settled, before the candidate exists
        state.append(token_ids)   # the drawn candidate; who draws another one
"""

from __future__ import annotations

from vllm_specdecpp.decision.estimator import ConfidenceEstimator, EntropyEstimator, Estimator, HeadEstimator
from vllm_specdecpp.decision.features import (
    SCALAR_FEATURES,
    StepFeatures,
    encode_scalars,
    features_from_logits,
)
from vllm_specdecpp.decision.from_options import make_rule
from vllm_specdecpp.decision.round import DraftRound
from vllm_specdecpp.decision.rules import FixedRule, StopRule, ThresholdRule, make_estimator

__all__ = [
    "ConfidenceEstimator",
    "DraftRound",
    "EntropyEstimator",
    "Estimator",
    "FixedRule",
    "HeadEstimator",
    "SCALAR_FEATURES",
    "StepFeatures",
    "StopRule",
    "ThresholdRule",
    "encode_scalars",
    "features_from_logits",
    "make_estimator",
    "make_rule",
]
