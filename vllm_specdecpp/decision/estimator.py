# SPDX-License-Identifier: Apache-2.0
"""Estimates of a candidate's acceptance probability, made without looking at the candidate about to be drawn."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from vllm_specdecpp.decision.features import StepFeatures
from vllm_specdecpp.head import AcceptanceHead


class Estimator(Protocol):
    """Scores one candidate of every request from a :class:`StepFeatures`.

    ``lag`` 0: the score is that of the candidate about to be drawn from these features.
    ``lag`` 1: of the one before, which the pass has just read (the paper's head).
    """

    name: str
    lag: int
    needs: frozenset[str]
    """Fields of :class:`StepFeatures` that are read."""

    def __call__(self, features: StepFeatures) -> Tensor:
        """Returns [num_reqs] float32 in [0, 1]; NaN counts as 0."""


class HeadEstimator:
    """The paper's acceptance head on the hidden state of the pass that read the candidate."""

    name = "head"
    lag = 1
    needs = frozenset({"hidden_states"})

    def __init__(self, head: AcceptanceHead) -> None:
        self.head = head

    @torch.no_grad()
    def __call__(self, features: StepFeatures) -> Tensor:
        return self.head.probability(_given(features, "hidden_states"))  # [num_reqs]


class ConfidenceEstimator:
    """The draft's top-1 probability: needs no training."""

    name = "confidence"
    lag = 0
    needs = frozenset({"top1_prob"})

    def __call__(self, features: StepFeatures) -> Tensor:
        return _given(features, "top1_prob")


class EntropyEstimator:
    """exp(-entropy), the inverse perplexity of the draft's distribution: needs no training."""

    name = "entropy"
    lag = 0
    needs = frozenset({"entropy"})

    def __call__(self, features: StepFeatures) -> Tensor:
        return torch.exp(-_given(features, "entropy"))  # [num_reqs]


def _given(features: StepFeatures, field: str) -> Tensor:
    value: Tensor | None = getattr(features, field)
    if value is None:
        raise ValueError(f"specdecpp: the stop rule reads features.{field}, but the draft step did not compute it")
    return value
