# SPDX-License-Identifier: Apache-2.0
"""The estimates that a head is compared with, all fitted on the same rows, and their figures on others."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from vllm_specdecpp.decision.features import SCALAR_FEATURES, encode_scalars
from vllm_specdecpp.head.files import Calibration
from vllm_specdecpp.training import statistics as metrics
from vllm_specdecpp.training.fit.calibration import fit_by_prompts, fit_regression, log_odds
from vllm_specdecpp.training.fit.fitting import score, targets

if TYPE_CHECKING:
    from vllm_specdecpp.data.dataset import LabelRows
    from vllm_specdecpp.head.model import AcceptanceHead

_CHUNK = 8192  # rows that the head scores at once


@dataclass(frozen=True)
class Scored:
    """Rows with the head's score; their hidden states are dropped."""

    rows: LabelRows
    logit: Tensor
    """[n] float32, accept minus reject logit, uncalibrated."""

    def select(self, mask: Tensor) -> Scored:
        """The rows of a [n] bool mask."""
        return Scored(self.rows.select(mask), self.logit[mask])


Estimate = Callable[[Scored], Tensor]
"""Rows to [n] probabilities of acceptance."""


@torch.no_grad()
def score_rows(head: AcceptanceHead, rows: LabelRows) -> Scored:
    """Run the head over all rows.

    Raises:
        ValueError: one line: a score is no finite number.
    """
    parts = torch.arange(len(rows)).split(_CHUNK)
    progress = tqdm(parts, desc="score", unit_scale=_CHUNK, unit="row", delay=2.0, leave=False, file=sys.stderr)
    chunks = (rows.select(index) for index in progress)
    logit = torch.cat([score(head, chunk.hidden, chunk.scalars) for chunk in chunks])  # [n]
    if num_bad := int((~logit.isfinite()).sum()):
        raise ValueError(
            f"specdecpp: the head's score of {num_bad} of {len(logit)} rows is no finite number; the labels "
            "hold hidden states or features that are none: collect them again"
        )
    return Scored(replace(rows, hidden=rows.hidden.new_zeros(len(rows), 0)), logit)


def fit_estimates(fit: Scored, shift: float) -> tuple[Calibration, dict[str, Estimate]]:
    """The head's calibration, and every estimate by its name, the head's first.

    Labels are min(1, p/q) where known, else the outcome.

    Args:
        fit: rows to fit on.
        shift: ln w_rej of the head.

    Raises:
        ValueError: one line: a scalar feature is no number.
    """
    label, position = targets(fit.rows), fit.rows.position

    def calibrated(logit: Callable[[Scored], Tensor], shift: float = 0.0) -> tuple[Calibration, Estimate]:
        found = fit_by_prompts(logit(fit), label, position, fit.rows.prompt, shift=shift)
        return found, lambda scored: found.probability(logit(scored), scored.rows.position)

    def features(scored: Scored) -> Tensor:
        return encode_scalars(scored.rows.scalars, SCALAR_FEATURES)  # [n, num_inputs]

    def confidence(scored: Scored) -> Tensor:
        return scored.rows.scalars["top1_prob"].clamp(0, 1)  # rounding may exceed 1

    regression = fit_regression(features(fit), label)
    calibration, head = calibrated(lambda scored: scored.logit, shift)
    return calibration, {
        "head": head,
        "head_uncalibrated": lambda scored: scored.logit.double().sigmoid(),
        "logit_features_calibrated": calibrated(lambda scored: regression.logit(features(scored)))[1],
        "confidence": confidence,
        "confidence_calibrated": calibrated(lambda scored: log_odds(confidence(scored)))[1],
    }


def judge(
    name: str, scored: Scored, estimates: Mapping[str, Estimate], *, resamples: int, seed: int
) -> list[dict[str, Any]]:
    """The rows of one set.

    Args:
        name: of the set.
        scored: its rows.
        estimates: by name; the first one is what the others are compared with.
        resamples: bootstrap replicates of the prompts.
        seed: of the bootstrap.

    Returns:
        One a estimate: figures with 95 % intervals (``_low``, ``_high``), and ``auc_over_<first>`` and
        ``log_loss_over_<first>``: its figure minus the first one's on the same replicates. None is an unknown number.
    """
    accepted, prompt = scored.rows.accepted, scored.rows.prompt
    rows: list[dict[str, Any]] = []
    base: tuple[str, metrics.Resamples] | None = None
    progress = tqdm(estimates.items(), desc=f"bootstrap {name}", delay=2.0, leave=False, file=sys.stderr)
    for estimator, estimate in progress:
        p = estimate(scored)
        found = metrics.resample(p, accepted, prompt, resamples=resamples, seed=seed)
        row: dict[str, Any] = {"set": name, "estimator": estimator}
        row["auc"] = metrics.auc(p, accepted)
        row["auc_low"], row["auc_high"] = metrics.interval(found.auc)
        row["log_loss"] = metrics.log_loss(p, accepted)
        row["log_loss_low"], row["log_loss_high"] = metrics.interval(found.log_loss)
        row |= {"brier": metrics.brier(p, accepted), "ece": metrics.ece(p, accepted)}
        base = base or (estimator, found)
        if estimator != base[0]:
            for key, ours, theirs in (
                ("auc", found.auc, base[1].auc),
                ("log_loss", found.log_loss, base[1].log_loss),
            ):
                over = f"{key}_over_{base[0]}"
                row[over] = row[key] - rows[0][key] if rows[0][key] is not None else math.nan
                row[f"{over}_low"], row[f"{over}_high"] = metrics.interval(ours - theirs)
        row |= {"num": len(p), "prompts": len(prompt.unique()), "accept_rate": float(accepted.double().mean())}
        rows.append({k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()})
    return rows


def by_set(scored: Scored) -> Iterator[tuple[str, Scored]]:
    """Each set that has rows, and, if there are several, all together last."""
    found = [(name, mask) for name in scored.rows.sets if bool((mask := scored.rows.in_set(name)).any())]
    for name, mask in found:
        yield name, scored.select(mask)
    if len(found) > 1:
        yield "all", scored
