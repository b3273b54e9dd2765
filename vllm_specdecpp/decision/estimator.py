# SPDX-License-Identifier: Apache-2.0
"""Estimates of a candidate's acceptance probability, made without looking at the candidate about to be drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from vllm_specdecpp.decision.features import StepFeatures, encode_scalars

if TYPE_CHECKING:  # the head imports this package's features
    from vllm_specdecpp.head.model import AcceptanceHead


class Estimator(Protocol):
    """Scores one candidate of every request from a :class:`StepFeatures`.

    ``lag`` 0: the score is that of the candidate about to be drawn from these features.
    ``lag`` 1: of the one before, which the pass has just read (the paper's head).
    """

    name: str
    lag: int
    needs: frozenset[str]
    """Fields of :class:`StepFeatures` that are read."""

    def __call__(self, features: StepFeatures, position: int) -> Tensor:
        """Score one candidate.

        Args:
            features: of num_reqs requests.
            position: 1-based index in the round of the candidate that is scored.

        Returns:
            [num_reqs] float32 in [0, 1]; NaN counts as 0.
        """


class HeadEstimator:
    """The acceptance head: the paper's with lag 1, the look-ahead one with lag 0."""

    name = "head"

    def __init__(self, head: AcceptanceHead) -> None:
        self.head = head
        self.lag = head.lag
        self.needs = frozenset({"hidden_states", *head.features})

    @torch.no_grad()
    def __call__(self, features: StepFeatures, position: int) -> Tensor:
        hidden_states = _given(features, "hidden_states")  # [num_reqs, hidden_size]
        scalars = None
        if self.head.features:
            columns = {name: _given(features, name) for name in self.head.features}
            scalars = encode_scalars(columns, self.head.features)  # [num_reqs, num_inputs]
        return self.head.probability(hidden_states, scalars, position)  # [num_reqs]


class ConfidenceEstimator:
    """The draft's top-1 probability: needs no training."""

    name = "confidence"
    lag = 0
    needs = frozenset({"top1_prob"})

    def __call__(self, features: StepFeatures, position: int) -> Tensor:
        return _given(features, "top1_prob")


class EntropyEstimator:
    """exp(-entropy), the inverse perplexity of the draft's distribution: needs no training."""

    name = "entropy"
    lag = 0
    needs = frozenset({"entropy"})

    def __call__(self, features: StepFeatures, position: int) -> Tensor:
        return torch.exp(-_given(features, "entropy"))  # [num_reqs]


def _given(features: StepFeatures, field: str) -> Tensor:
    value: Tensor | None = getattr(features, field)
    if value is None:
        raise ValueError(f"specdecpp: the stop rule reads features.{field}, but the draft step did not compute it")
    return value
