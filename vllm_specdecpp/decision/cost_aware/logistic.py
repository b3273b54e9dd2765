# SPDX-License-Identifier: Apache-2.0
"""A logistic regression over one score that learns while serving."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

BUCKET_ENDS = (1, 2, 3, 4, 6, 9, 14)
"""Last position of each bucket but the last."""
NUM_BUCKETS = len(BUCKET_ENDS) + 1
BUCKET_OF = np.searchsorted(BUCKET_ENDS, np.arange(1025))  # position -> bucket
BUCKETS: list[int] = BUCKET_OF.tolist()
"""Position -> bucket; positions beyond the list are in the last one."""
LAST = len(BUCKETS) - 1
MAX_LOGIT = 8.0
"""Scores beyond are taken as this sure: float32 tells them apart no better, and one of them would rule the slope."""
_LEAST, _MOST = 1 / (1 + math.exp(MAX_LOGIT)), 1 / (1 + math.exp(-MAX_LOGIT))
_SLOPE_PRIOR, _COMMON_PRIOR, _BUCKET_PRIOR = 20.0, 2.0, 4.0
"""Precisions of slope, common intercept, bucket intercepts: each worth about 20-40 observed candidates."""
_MIN_SLOPE, _MAX_SLOPE = 0.0, 4.0
_MAX_STEP = 0.5
_MIN_WEIGHT = 1e-4
"""Of an observation, however sure the model was of it."""
_FEW = 12
"""Up to so many observations a loop over floats is faster than arrays."""


def logit(scores: Array) -> Array:
    """Log-odds of scores in [0, 1], bounded; NaN stays NaN."""
    p = np.minimum(np.maximum(scores, _LEAST), _MOST)
    return np.minimum(np.log(p / (1 - p)), MAX_LOGIT)


def logit_one(score: float) -> float:
    """:func:`logit` of one score."""
    if score != score:
        return math.nan
    p = min(max(score, _LEAST), _MOST)
    return min(math.log(p / (1 - p)), MAX_LOGIT)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-np.minimum(np.maximum(x, -30.0), 30.0)))


def sigmoid_one(x: float) -> float:
    return 1 / (1 + math.exp(-min(max(x, -30.0), 30.0)))


def bucket(positions: NDArray[np.int64] | int) -> NDArray[np.int64]:
    """The bucket of 1-based positions."""
    return BUCKET_OF[np.minimum(positions, len(BUCKET_OF) - 1)]


class OnlineLogistic:
    """P(y = 1) = sigmoid(slope * x + common + intercept[bucket]), by damped Newton steps with forgetting.

    What was learnt decays towards the prior, so old rounds fade and a parameter that nothing speaks of any more returns
    to where it started. Steps are bounded; a batch that would give NaN is left out. The precision matrix is the prior's
    diagonal plus faded sums of w [x, 1, e_bucket] [x, 1, e_bucket]^T, w = p (1 - p); buckets touch only slope and
    common intercept, so a step is solved by the Schur complement of two rows.

    Args:
        slope, common: start and prior mean; the buckets' own parts start at 0.
        memory: observations after which an old one counts 1/e.
        stiffness: how hard the prior pulls, as a multiple.
    """

    def __init__(self, slope: float = 1.0, common: float = 0.0, memory: float = 1500.0, stiffness: float = 1.0) -> None:
        self.theta = np.array([slope, common, *[0.0] * NUM_BUCKETS])  # [2 + NUM_BUCKETS]
        self._prior: list[float] = self.theta.tolist()
        self._memory = memory
        priors = _SLOPE_PRIOR, _COMMON_PRIOR, _BUCKET_PRIOR
        self._slope_prior, self._common_prior, self._bucket_prior = (stiffness * weight for weight in priors)
        # Faded sums over observations, by bucket: w, w x; and w x^2 over all.
        self._w, self._wx, self._wxx = [0.0] * NUM_BUCKETS, [0.0] * NUM_BUCKETS, 0.0

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

    def shift(self, common: float) -> None:
        """Move the common intercept, and what it is drawn to."""
        self.theta = self.theta.copy()
        self.theta[1] += common
        self._prior[1] += common

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
        if len(x) <= _FEW:
            self.update_few(x.tolist(), buckets.tolist(), labels.tolist())
            return
        p = sigmoid(self.log_odds(x, buckets))
        w, miss = np.maximum(p * (1 - p), _MIN_WEIGHT), labels - p

        def by_bucket(weights: Array) -> list[float]:
            return np.bincount(buckets, weights=weights, minlength=NUM_BUCKETS).tolist()

        wx = w * x
        self._step(len(x), by_bucket(w), by_bucket(wx), float(wx @ x), by_bucket(miss), float(miss @ x))

    def update_few(self, x: list[float], buckets: list[int], labels: list[float]) -> None:
        """:meth:`update` for a handful of observations, all of them finite."""
        slope, common, *own = self.theta.tolist()
        w, wx, miss = [0.0] * NUM_BUCKETS, [0.0] * NUM_BUCKETS, [0.0] * NUM_BUCKETS
        wxx = miss_x = 0.0
        for score, b, label in zip(x, buckets, labels, strict=True):
            p = sigmoid_one(slope * score + common + own[b])
            weight, error = max(p * (1 - p), _MIN_WEIGHT), label - p
            w[b] += weight
            wx[b] += weight * score
            wxx += weight * score * score
            miss[b] += error
            miss_x += error * score
        if x:
            self._step(len(x), w, wx, wxx, miss, miss_x)

    def rest(self) -> None:
        """Nothing was observed where something might have been: what was learnt fades as by one observation."""
        keep = math.exp(-1 / self._memory)
        self._w, self._wx = [keep * x for x in self._w], [keep * x for x in self._wx]
        self._wxx *= keep
        self.theta = np.array(self._prior) + keep * (self.theta - np.array(self._prior))

    def _step(
        self, n: int, w: list[float], wx: list[float], wxx: float, miss: list[float], miss_x: float
    ) -> None:  # fmt: skip
        """A Newton step from n observations' sums; ``miss``: label minus p, by bucket."""
        keep = math.exp(-n / self._memory)
        theta, prior, fade = self.theta.tolist(), self._prior, 1 - keep
        w = [keep * old + new for old, new in zip(self._w, w, strict=True)]
        wx = [keep * old + new for old, new in zip(self._wx, wx, strict=True)]
        wxx = keep * self._wxx + wxx
        # Gradient: the misses, and the prior's pull in place of the part of the past that fades.
        g_slope = miss_x + fade * self._slope_prior * (prior[0] - theta[0])
        g_common = sum(miss) + fade * self._common_prior * (prior[1] - theta[1])
        pull = fade * self._bucket_prior
        g = [m + pull * (start - now) for m, start, now in zip(miss, prior[2:], theta[2:], strict=True)]
        # Eliminate the buckets: a 2 x 2 system in slope and common intercept is left.
        a, b, c = wxx + self._slope_prior, sum(wx), sum(w) + self._common_prior
        for w_b, wx_b, g_b in zip(w, wx, g, strict=True):
            scale = 1 / (w_b + self._bucket_prior)
            a -= wx_b * wx_b * scale
            b -= wx_b * w_b * scale
            c -= w_b * w_b * scale
            g_slope -= wx_b * g_b * scale
            g_common -= w_b * g_b * scale
        determinant = a * c - b * b
        d_slope = (c * g_slope - b * g_common) / determinant
        d_common = (a * g_common - b * g_slope) / determinant
        step = [d_slope, d_common]
        step += [
            (g_b - wx_b * d_slope - w_b * d_common) / (w_b + self._bucket_prior)
            for w_b, wx_b, g_b in zip(w, wx, g, strict=True)
        ]
        if not math.isfinite(sum(step)):
            return
        self._w, self._wx, self._wxx = w, wx, wxx
        now = [old + min(max(move, -_MAX_STEP), _MAX_STEP) for old, move in zip(theta, step, strict=True)]
        now[0] = min(max(now[0], _MIN_SLOPE), _MAX_SLOPE)
        self.theta = np.array(now)

    def state(self) -> dict[str, Any]:
        """What was learnt, as JSON."""
        return {"theta": self.theta.tolist(), "w": self._w, "wx": self._wx, "wxx": self._wxx, "prior": self._prior}

    def restore(self, state: dict[str, Any], weight: float = 1.0) -> None:
        """Take up :meth:`state`; ``weight`` in [0, 1] says how much its observations still count."""
        self.theta, self._prior = np.array(state["theta"], dtype=np.float64), [float(x) for x in state["prior"]]
        self._w, self._wx = [weight * x for x in state["w"]], [weight * x for x in state["wx"]]
        self._wxx = weight * float(state["wxx"])
