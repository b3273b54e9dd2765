# SPDX-License-Identifier: Apache-2.0
"""Fitting what turns a score into a probability: logistic models with Gaussian priors.

In float64 on the CPU: on one machine the same rows give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from vllm_specdecpp.head.files import Calibration
from vllm_specdecpp.training.statistics import row_losses

SLOPE_PRECISION = 1.0
"""The slope's prior is Normal(1, 1 / precision): it damps the slope where scores separate the labels perfectly."""

COMMON_PRECISION = 0.01
"""Of the intercept that all positions share: wide, but no labels at all leave the w_rej shift as it is."""

POSITION_PRECISION = 4.0
"""Of each position's distance from the common intercept: sd 0.5, which some 40 rows with p = 0.9 outweigh."""

STRENGTHS = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
"""Factors on all three precisions, among which prompts that were left out choose: rows of one prompt are not
independent, and a calibration on a dozen prompts does more harm than good unless it is held back."""

FOLDS = 5
"""Parts of the prompts, each left out once."""

MAX_POSITIONS = 20
MIN_ROWS = 100
"""A position with an intercept of its own has this many rows at or beyond it; all beyond share the last one."""

MAX_LOG_ODDS = 12.0
"""Where the log-odds of a training-free probability saturate, as in ``encode_scalars``."""

_GRADIENT_NORM = 1e-7  # ends a fit


def fit_calibration(
    logit: Tensor, accepted: Tensor, position: Tensor, *, shift: float = 0.0, strength: float = 1.0
) -> Calibration:
    """Fit one slope and an intercept per position, the latter shrunk to the one they share.

    Args:
        logit: [num_rows] the score on the log-odds scale.
        accepted: [num_rows] label in [0, 1]: the outcome, or min(1, p/q) where that is known.
        position: [num_rows] 1-based index of the candidate in its round.
        shift: what the common intercept is before any label is seen: ln w_rej of a head trained with it, because the
            weighted loss has its optimum at p / (p + w_rej (1 - p)), whose log-odds are ln w_rej too low.
        strength: factor on the precisions of all priors.

    Raises:
        ValueError: one line: a score is no finite number.
    """
    logit, accepted = _finite(logit), accepted.double()
    num_positions = _num_positions(position)
    index = (position - 1).clamp(max=num_positions - 1)
    deviation = torch.nn.functional.one_hot(index, num_positions).double()  # [num_rows, num_positions]
    inputs = torch.cat([logit[:, None], torch.ones_like(logit)[:, None], deviation], dim=1)
    prior_mean = torch.tensor([1.0, shift] + [0.0] * num_positions, dtype=torch.float64)
    precision = torch.tensor([SLOPE_PRECISION, COMMON_PRECISION] + [POSITION_PRECISION] * num_positions).double()
    precision *= strength
    slope, common, *deviations = fit_logistic(inputs, accepted, prior_mean, precision, torch.ones_like(logit)).tolist()
    return Calibration(slope=slope, intercepts=[common + each for each in deviations])


def fit_by_prompts(
    logit: Tensor, accepted: Tensor, position: Tensor, prompt: Tensor, *, shift: float = 0.0
) -> Calibration:
    """:func:`fit_calibration` with priors as strong as serves prompts that it was not fitted on.

    Each part of the prompts is left out once. Of the factors of :data:`STRENGTHS` the strongest is taken whose log-loss
    on what was left out is within a standard error over prompts of the lowest: a gain that a few prompts may have made
    by chance moves nothing. With but one prompt the weakest is taken.

    Args:
        logit: [num_rows] the score on the log-odds scale.
        accepted: [num_rows] label in [0, 1].
        position: [num_rows] 1-based index of the candidate in its round.
        prompt: [num_rows] whole number, the row's prompt.
        shift: as in :func:`fit_calibration`.

    Raises:
        ValueError: as :func:`fit_calibration`.
    """

    def fitted(rows: Tensor, strength: float) -> Calibration:
        return fit_calibration(logit[rows], accepted[rows], position[rows], shift=shift, strength=strength)

    _finite(logit)
    whole = torch.ones(len(logit), dtype=torch.bool)
    strength = STRENGTHS[0]
    prompts, number = prompt.unique(return_inverse=True)  # [num_prompts], [num_rows]
    if (num_folds := min(FOLDS, len(prompts))) > 1:
        losses = torch.zeros(len(STRENGTHS), len(prompts), dtype=torch.float64)  # summed over each prompt's rows
        for i, each in enumerate(STRENGTHS):
            for fold in range(num_folds):
                out = number % num_folds == fold  # [num_rows]
                p = fitted(~out, each).probability(logit[out], position[out])
                losses[i].index_add_(0, number[out], row_losses(p, accepted[out]))
        over = losses - losses[losses.sum(1).argmin()]  # [num_strengths, num_prompts]
        error = over.std(dim=1) * math.sqrt(len(prompts))
        strength = max(each for each, near in zip(STRENGTHS, over.sum(1) <= error, strict=True) if near)
    return fitted(whole, strength)


@dataclass(frozen=True)
class LogisticRegression:
    """Log-odds = intercept + inputs @ coefficients."""

    coefficients: Tensor
    """[num_inputs] float64."""

    intercept: float

    def logit(self, inputs: Tensor) -> Tensor:
        """[num_rows] float64 log-odds of ``inputs`` [num_rows, num_inputs]."""
        return inputs.double() @ self.coefficients + self.intercept


def fit_regression(
    inputs: Tensor, accepted: Tensor, *, weights: Tensor | None = None, precision: float = 1.0
) -> LogisticRegression:
    """Ridge logistic regression; the ridge acts on standardised inputs, and not on the intercept.

    Args:
        inputs: [num_rows, num_inputs].
        accepted: [num_rows] label in [0, 1].
        weights: [num_rows]; all 1 by default.
        precision: of the coefficients' prior.

    Raises:
        ValueError: one line: an input is no finite number.
    """
    inputs, accepted = _finite(inputs), accepted.double()
    weights = torch.ones_like(accepted) if weights is None else weights.double()
    mean, scale = inputs.mean(0), inputs.std(0, correction=0)  # [num_inputs]
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # a constant input gets coefficient 0
    standard = torch.cat([(inputs - mean) / scale, torch.ones_like(accepted)[:, None]], dim=1)
    precisions = torch.tensor([precision] * inputs.shape[1] + [COMMON_PRECISION], dtype=torch.float64)
    found = fit_logistic(standard, accepted, torch.zeros_like(precisions), precisions, weights)
    coefficients = found[:-1] / scale  # [num_inputs]
    return LogisticRegression(coefficients, float(found[-1] - mean @ coefficients))


def fit_logistic(inputs: Tensor, labels: Tensor, prior_mean: Tensor, precision: Tensor, weights: Tensor) -> Tensor:
    """Maximum a-posteriori coefficients [num_inputs] of a logistic model, by scipy's trust-region Newton method.

    The priors make the objective strictly convex: it has one optimum, whatever the labels.

    Args:
        inputs: [num_rows, num_inputs] float64.
        labels: [num_rows] float64 in [0, 1].
        prior_mean: [num_inputs] float64, also where the search starts.
        precision: [num_inputs] float64, > 0.
        weights: [num_rows] float64, >= 0.
    """

    def value_and_gradient(at: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        coefficients = torch.from_numpy(at)
        z, away = inputs @ coefficients, coefficients - prior_mean  # [num_rows], [num_inputs]
        losses = weights * (torch.nn.functional.softplus(z) - labels * z)  # [num_rows]
        gradient = inputs.T @ (weights * (z.sigmoid() - labels)) + precision * away
        return float(losses.sum() + (precision * away.square()).sum() / 2), gradient.numpy()

    def hessian(at: NDArray[np.float64]) -> NDArray[np.float64]:
        p = (inputs @ torch.from_numpy(at)).sigmoid()  # [num_rows]
        curvature = weights * p * (1 - p)
        return (torch.diag(precision) + inputs.T @ (inputs * curvature[:, None])).numpy()

    found = minimize(
        value_and_gradient, prior_mean.numpy(), jac=True, hess=hessian, method="trust-exact",
        options={"gtol": _GRADIENT_NORM},
    )  # fmt: skip
    # Where rounding has ended the search before that norm, it is as good.
    return torch.from_numpy(found.x)


def log_odds(probability: Tensor) -> Tensor:
    """Log-odds, clipped to +-:data:`MAX_LOG_ODDS`: the score of a training-free estimate before calibration."""
    return probability.double().logit().clamp(-MAX_LOG_ODDS, MAX_LOG_ODDS)


def shift_of(metadata: Mapping[str, Any]) -> float:
    """ln w_rej of a head's config, 0 if it says nothing.

    Raises:
        ValueError: one line: ``w_rej`` is no number above 0.
    """
    w_rej = metadata.get("w_rej", 1.0)
    if not (isinstance(w_rej, (int, float)) and not isinstance(w_rej, bool) and 0 < w_rej < math.inf):
        raise ValueError(f"specdecpp: w_rej={w_rej!r} in the head's config must be a number above 0; correct it there")
    return math.log(w_rej)


def _num_positions(position: Tensor) -> int:
    """Positions with an intercept of their own, from 1 on; the last one stands for all beyond."""
    at_least = torch.bincount(position).flip(0).cumsum(0).flip(0)[1:]  # [max position] rows at or beyond it
    return min(max(int((at_least >= MIN_ROWS).sum()), 1), MAX_POSITIONS)


def _finite(scores: Tensor) -> Tensor:
    """In float64; refuses what a run that went wrong has left."""
    if num_bad := int((~scores.isfinite()).sum()):
        raise ValueError(
            f"specdecpp: {num_bad} of {scores.numel()} scores are no finite numbers; collect the labels or train again"
        )
    return scores.detach().double()
