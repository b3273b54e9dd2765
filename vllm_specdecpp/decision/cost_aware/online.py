# SPDX-License-Identifier: Apache-2.0
"""Online calibration: acceptance probabilities from scores, learnt while serving.

Only observed candidates teach: the accepted ones and the first rejected one of a round. What the target would have said
of later ones is unknown, and leaving them out biases nothing: whether a candidate is observed depends on the candidates
before it, whose scores and outcomes came first.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

BUCKET_ENDS = (1, 2, 3, 4, 6, 9, 14)
"""Last position of each bucket but the last."""
NUM_BUCKETS = len(BUCKET_ENDS) + 1
_BUCKET_OF = np.searchsorted(BUCKET_ENDS, np.arange(1025))  # position -> bucket
MAX_LOGIT = 8.0
"""Scores beyond are taken as this sure: float32 tells them apart no better, and one of them would rule the slope."""
_PRIOR_PRECISION = np.array([20.0, 2.0] + [4.0] * NUM_BUCKETS)
"""Of slope, common intercept, bucket intercepts: each worth about 20-40 observed candidates."""
_MIN_SLOPE, _MAX_SLOPE = 0.0, 4.0
_MAX_STEP = 0.5


def logit(scores: Array) -> Array:
    """Log-odds of scores in [0, 1], bounded; NaN stays NaN."""
    p = np.clip(scores, 1e-7, 1 - 1e-7)
    return np.clip(np.log(p / (1 - p)), -MAX_LOGIT, MAX_LOGIT)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-np.clip(x, -30, 30)))


def bucket(positions: Array | int) -> NDArray[np.int64]:
    """The bucket of 1-based positions."""
    return _BUCKET_OF[np.minimum(positions, len(_BUCKET_OF) - 1)]


class OnlineLogistic:
    """P(y = 1) = sigmoid(slope * x + common + intercept[bucket]), by damped Newton steps with forgetting.

    The precision matrix decays towards the prior's, so old rounds fade and a parameter that nothing speaks of any more
    returns to where it started. Steps are bounded; a batch that would give NaN is left out.

    Args:
        slope, common: start and prior mean.
        intercepts: [NUM_BUCKETS] start and prior mean of the bucket's own part; None: 0.
        memory: observations after which an old one counts 1/e.
    """

    def __init__(
        self, slope: float = 1.0, common: float = 0.0, intercepts: Array | None = None, memory: float = 1500.0
    ) -> None:
        own = np.zeros(NUM_BUCKETS) if intercepts is None else np.asarray(intercepts, dtype=np.float64)
        self.theta = np.concatenate([[slope, common], own])  # [2 + NUM_BUCKETS]
        self._prior = self.theta.copy()
        self._precision = np.diag(_PRIOR_PRECISION)
        self._memory = memory

    @property
    def slope(self) -> float:
        return float(self.theta[0])

    @property
    def intercepts(self) -> Array:
        """[NUM_BUCKETS] common part included."""
        return self.theta[1] + self.theta[2:]

    def log_odds(self, x: Array, buckets: NDArray[np.int64]) -> Array:
        """Of the label 1: [n]."""
        return self.theta[0] * x + self.theta[1] + self.theta[2:][buckets]

    def update(self, x: Array, buckets: NDArray[np.int64], labels: Array) -> None:
        """Learn from observed candidates; rows with NaN are ignored.

        Args:
            x: [n] log-odds of the scores.
            buckets: [n].
            labels: [n] 1 accepted, 0 rejected.
        """
        good = np.isfinite(x) & np.isfinite(labels)
        if not good.any():
            return
        x, buckets, labels = x[good], buckets[good], labels[good]
        n = len(x)
        phi = np.zeros((n, len(self.theta)))
        phi[:, 0], phi[:, 1] = x, 1.0
        phi[np.arange(n), 2 + buckets] = 1.0
        p = sigmoid(phi @ self.theta)
        keep = np.exp(-n / self._memory)
        # The part of the past that fades is replaced by the prior.
        pull = (1 - keep) * _PRIOR_PRECISION * (self._prior - self.theta)
        precision = keep * self._precision + (phi.T * np.maximum(p * (1 - p), 1e-4)) @ phi
        precision[np.diag_indices_from(precision)] += (1 - keep) * _PRIOR_PRECISION
        step = np.linalg.solve(precision, phi.T @ (labels - p) + pull)
        if not np.isfinite(step).all():
            return
        self._precision = precision
        self.theta = self.theta + np.clip(step, -_MAX_STEP, _MAX_STEP)
        self.theta[0] = min(max(self.theta[0], _MIN_SLOPE), _MAX_SLOPE)


class AcceptanceModel:
    """Acceptance of the candidate that was scored, and of those after it.

    Two logistics over the log-odds x_k of candidate k's score: ``this`` for k itself, ``next`` for k + 1 given that k
    was accepted: the decision to draw k + 1 comes before the pass that would score it. Candidates further on follow the
    same regression: the expected score of k + 1 is what ``this`` would need to give what ``next`` says. So a high score
    fades to the usual acceptance at the rate at which scores were seen to.

    Where there is no score (NaN, a lagged estimator's first step) the mean acceptance at that position stands in.

    Args:
        slope, common, intercepts: start of ``this``: the identity, or a calibration that came with the head.
    """

    def __init__(self, slope: float = 1.0, common: float = 0.0, intercepts: Array | None = None) -> None:
        self.this = OnlineLogistic(slope, common, intercepts)
        # Before anything was seen: half way back to an acceptance of 0.7.
        self.next = OnlineLogistic(0.5 * slope, 0.5 * common + 0.4, None if intercepts is None else 0.5 * intercepts)
        self._accepted = np.full(NUM_BUCKETS, 0.7 * 4)
        self._observed = np.full(NUM_BUCKETS, 4.0)

    def mean(self, buckets: NDArray[np.int64]) -> Array:
        """Mean acceptance lately at these buckets, given that all before were accepted."""
        return self._accepted[buckets] / self._observed[buckets]

    def accept(self, x: Array, position: int) -> Array:
        """[num_reqs] acceptance of the scored candidates at ``position``."""
        b = int(_BUCKET_OF[min(position, 1024)])
        p = sigmoid(self.this.theta[0] * x + self.this.theta[1] + self.this.theta[2 + b])
        return np.where(np.isnan(p), self._accepted[b] / self._observed[b], p)

    def following(self, x: Array, position: int, num: int) -> Array:
        """Acceptance of the ``num`` candidates after the one scored x at ``position``, each given those before.

        Args:
            x: [num_reqs] log-odds; NaN where there is no score.
            position: 1-based; 0: nothing was scored yet in this round.
            num: how many.

        Returns:
            [num_reqs, num].
        """
        this, after = self.this.theta, self.next.theta
        buckets = _BUCKET_OF[np.minimum(np.arange(position, position + num + 1), 1024)]
        known = np.isfinite(x)
        log_odds = np.empty((len(x), num))
        expected = np.where(known, x, 0.0)
        slope = max(float(this[0]), 0.1)
        for j in range(num):
            y = after[0] * expected + (after[1] + after[2 + buckets[j]])
            log_odds[:, j] = y
            expected = np.clip((y - (this[1] + this[2 + buckets[j + 1]])) / slope, -MAX_LOGIT, MAX_LOGIT)
        out = sigmoid(log_odds)
        return out if known.all() else np.where(known[:, None], out, self.mean(buckets[1:])[None])

    def update(self, x: Array, labels: Array) -> None:
        """Learn from one verified batch.

        Args:
            x: [num_steps, num_reqs] log-odds of candidate k's score in row k - 1; NaN: none.
            labels: [num_steps, num_reqs] 1 accepted, 0 first rejection, NaN not observed.
        """
        if not labels.size:
            return
        buckets = np.broadcast_to(_BUCKET_OF[1 : len(labels) + 1, None], labels.shape)
        seen = np.isfinite(labels)
        if not seen.any():
            return
        fade = np.exp(-seen.sum() / 1500.0)
        per_bucket = np.bincount(buckets[seen], minlength=NUM_BUCKETS)
        accepted = np.bincount(buckets[seen], weights=labels[seen], minlength=NUM_BUCKETS)
        # The prior's four candidates stay, so that a bucket is never without a mean.
        self._accepted = 2.8 + fade * (self._accepted - 2.8) + accepted
        self._observed = 4.0 + fade * (self._observed - 4.0) + per_bucket
        self.this.update(x[seen], buckets[seen], labels[seen])
        pairs = seen[1:]
        self.next.update(x[:-1][pairs], buckets[:-1][pairs], labels[1:][pairs])
