# SPDX-License-Identifier: Apache-2.0
"""How good an estimate of the acceptance probability is: AUC, log-loss, Brier score, ECE, and their uncertainty.

Rows are on the CPU; everything is computed in float64 and is the same at every call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import binary_cross_entropy, pad

NUM_BINS = 15
EPSILON = 1e-7
"""The log-loss clips probabilities this far from 0 and 1: about float32's resolution below 1."""


@dataclass(frozen=True)
class Reliability:
    """Rows binned by their estimate, in bins of equal width over [0, 1]."""

    num: Tensor
    """[bins] float64, rows in the bin."""

    probability: Tensor
    """[bins] float64, their mean estimate; NaN in an empty bin."""

    accept_rate: Tensor
    """[bins] float64, the share of them that was accepted; NaN in an empty bin."""

    @property
    def ece(self) -> float:
        """Expected calibration error: mean distance between estimate and accept rate, weighted by the bins' rows."""
        gap = (self.probability - self.accept_rate).abs().nan_to_num(0.0)  # [bins]
        return float((gap * self.num).sum() / self.num.sum())


@dataclass(frozen=True)
class Resamples:
    """Bootstrap replicates of one estimator's figures; two of the same rows and seed are paired."""

    auc: Tensor
    """[resamples] float64; NaN where a replicate holds accepted or rejected rows only."""

    log_loss: Tensor
    """[resamples] float64."""


def auc(scores: Tensor, accepted: Tensor) -> float:
    """P(an accepted row scores higher than a rejected one), ties counting half: the area under the ROC curve.

    Args:
        scores: [num_rows] any finite or infinite numbers, higher for "accepted".
        accepted: [num_rows] 1 or 0.

    Returns:
        NaN if no row is accepted, or none rejected.
    """
    if len(accepted.unique()) < 2:
        return math.nan
    finite = scores.detach().double().nan_to_num()  # infinities: the largest numbers
    return float(roc_auc_score(accepted.numpy(), finite.numpy()))


def row_losses(probability: Tensor, accepted: Tensor) -> Tensor:
    """[num_rows] float64, -log of the probability given to what happened, in nats."""
    clipped = probability.double().clamp(EPSILON, 1 - EPSILON)
    return binary_cross_entropy(clipped, accepted.double(), reduction="none")


def log_loss(probability: Tensor, accepted: Tensor) -> float:
    """Mean of :func:`row_losses`."""
    return float(row_losses(probability, accepted).mean())


def brier(probability: Tensor, accepted: Tensor) -> float:
    """Mean squared distance between estimate and outcome."""
    return float((probability.double() - accepted.double()).square().mean())


def ece(probability: Tensor, accepted: Tensor, bins: int = NUM_BINS) -> float:
    """Expected calibration error over ``bins`` bins of equal width."""
    return reliability(probability, accepted, bins).ece


def chance_ece(probability: Tensor, seed: int, draws: int = 50) -> float:
    """Mean ECE of outcomes that are drawn from the estimate itself, each row by itself: what chance alone makes."""
    generator = torch.Generator().manual_seed(seed)
    p = probability.double()
    return sum(ece(p, torch.bernoulli(p, generator=generator)) for _ in range(draws)) / draws


def reliability(probability: Tensor, accepted: Tensor, bins: int = NUM_BINS) -> Reliability:
    """Bin the rows by their estimate. A bin holds its lower edge; 1 belongs to the last one."""
    probability, accepted = probability.double(), accepted.double()
    index = (probability * bins).long().clamp(max=bins - 1)  # [num_rows]
    num = torch.bincount(index, minlength=bins).double()  # [bins]
    mean = torch.bincount(index, probability, minlength=bins) / num  # 0 / 0 is NaN
    return Reliability(num, mean, torch.bincount(index, accepted, minlength=bins) / num)


def resample(
    probability: Tensor, accepted: Tensor, prompt: Tensor, *, resamples: int = 300, seed: int = 0
) -> Resamples:
    """Bootstrap over prompts: rows of one prompt are not independent, so prompts are drawn, with replacement.

    Args:
        probability: [num_rows].
        accepted: [num_rows] 1 or 0.
        prompt: [num_rows] whole number, the row's prompt.
        resamples: replicates.
        seed: the same one gives the same draws of prompts, so that estimators can be compared replicate by replicate.
    """
    probability, accepted = probability.double(), accepted.double()
    prompts, row_prompt = prompt.unique(return_inverse=True)  # [num_prompts], [num_rows]
    num_prompts = len(prompts)
    loss_sums = torch.bincount(row_prompt, row_losses(probability, accepted), minlength=num_prompts)  # [num_prompts]
    num_rows = torch.bincount(row_prompt, minlength=num_prompts).double()  # [num_prompts]
    ordered, order = probability.sort()
    accepted, row_prompt = accepted[order], row_prompt[order]
    first, last = (torch.searchsorted(ordered, ordered, right=right) for right in (False, True))  # of equal scores
    generator = torch.Generator().manual_seed(seed)
    aucs, losses = [], []
    for _ in range(resamples):
        drawn = torch.randint(num_prompts, (num_prompts,), generator=generator)
        times = torch.bincount(drawn, minlength=num_prompts).double()  # [num_prompts]
        weights = times[row_prompt]  # [num_rows]
        positive, negative = weights * accepted, weights * (1 - accepted)
        below = pad(negative.cumsum(0), (1, 0))  # [num_rows + 1]
        wins = positive @ (below[first] + below[last]) / 2  # a tie counts half
        aucs.append(wins / (positive.sum() * negative.sum()))  # 0 / 0 is NaN
        losses.append((times * loss_sums).sum() / (times * num_rows).sum())
    return Resamples(torch.stack(aucs), torch.stack(losses))


def interval(values: Tensor) -> tuple[float, float]:
    """95 % percentile interval of bootstrap replicates, without the NaN ones; (NaN, NaN) if there is no other."""
    values = values[~values.isnan()]  # [replicates]
    if not len(values):
        return math.nan, math.nan
    low, high = torch.quantile(values, values.new_tensor([0.025, 0.975])).tolist()
    return low, high
