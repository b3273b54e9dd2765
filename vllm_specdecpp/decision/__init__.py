# SPDX-License-Identifier: Apache-2.0
"""How long to draft: pure torch, batched over requests, no vLLM import.

One loop serves every adapter::

    state = RoundState(make_rule(config, head), max_lengths)
    while state.any_running():
        features = ...            # the draft's forward pass
        state.observe(features)   # decides on going on, before the candidate exists
        state.append(token_ids)   # the drawn candidate is always submitted
"""

from __future__ import annotations

from vllm_specdecpp.decision.estimator import ConfidenceEstimator, EntropyEstimator, Estimator, HeadEstimator
from vllm_specdecpp.decision.features import (
    SCALAR_FEATURES,
    StepFeatures,
    encode_scalars,
    features_from_logits,
)
from vllm_specdecpp.decision.round import CostAwareState, DraftRound, RoundState
from vllm_specdecpp.decision.rules import FixedRule, StopRule, ThresholdRule, make_estimator, make_rule

__all__ = [
    "ConfidenceEstimator",
    "CostAwareState",
    "DraftRound",
    "EntropyEstimator",
    "Estimator",
    "FixedRule",
    "HeadEstimator",
    "RoundState",
    "SCALAR_FEATURES",
    "StepFeatures",
    "StopRule",
    "ThresholdRule",
    "encode_scalars",
    "features_from_logits",
    "make_estimator",
    "make_rule",
]
