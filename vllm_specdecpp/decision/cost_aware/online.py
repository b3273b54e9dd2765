# SPDX-License-Identifier: Apache-2.0
"""Online calibration: acceptance probabilities from scores, learnt while serving.

Only observed candidates teach: the accepted ones and the first rejected one of a round. What the target would have said
of later ones is unknown, and leaving them out biases nothing: whether a candidate is observed depends on the candidates
before it, whose scores and outcomes came first.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from vllm_specdecpp.decision.cost_aware.logistic import (
    BUCKET_OF,
    BUCKETS,
    LAST,
    MAX_LOGIT,
    NUM_BUCKETS,
    Array,
    OnlineLogistic,
    bucket,
    logit,
    logit_one,
    sigmoid,
)

__all__ = ["AcceptanceModel", "OnlineLogistic", "bucket", "logit", "sigmoid"]

_MEAN, _MEAN_WEIGHT = 0.75, 4.0
"""Acceptance of a candidate before anything was seen, and how many candidates that is worth."""
_CARRIES = 0.25
"""Share of a score's log-odds that the next candidate inherits, before it was learnt: 0.1 to 0.15 with the greedy Qwen
pair, more where good and bad stretches are long."""
_NEXT_STIFFNESS = 4.0
"""Pull of that start. Drafts end where ``next`` says so, so it hardly sees what would speak against a low estimate:
chat after code was drafted too short."""


class AcceptanceModel:
    """Acceptance of the candidate that was scored, and of those after it.

    Two logistics over the log-odds x_k of candidate k's score: ``this`` for k itself, ``next`` for k + 1 given that k
    was accepted: the decision to draw k + 1 comes before the pass that would score it. Candidates further on follow the
    same regression (``tails.following``): the expected score of k + 1 is what ``this`` would need to give what ``next``
    says. So a high score fades to the usual acceptance at the rate at which scores were seen to.

    Where there is no score (NaN, a lagged estimator's first step) the mean acceptance at that position stands in.

    Args:
        slope, common, intercepts: start of ``this``: the identity, or a calibration that came with the head.
        memory: observed candidates after which an old one counts 1/e.
    """

    def __init__(
        self, slope: float = 1.0, common: float = 0.0, intercepts: Array | None = None, *, memory: float = 1500.0
    ) -> None:
        self._memory = memory
        self.this = OnlineLogistic(slope, common, intercepts, memory)
        # Before anything was seen: most of the way back to the mean acceptance, which _recentre follows.
        self._centre = logit_one(_MEAN)
        own = None if intercepts is None else _CARRIES * np.asarray(intercepts, dtype=np.float64)
        start = _CARRIES * common + (1 - _CARRIES) * self._centre
        self.next = OnlineLogistic(_CARRIES * slope, start, own, memory, _NEXT_STIFFNESS)
        # Per bucket, faded: observed candidates, and accepted ones.
        self._observed, self._accepted = np.zeros(NUM_BUCKETS), np.zeros(NUM_BUCKETS)
        self._mean = np.full(NUM_BUCKETS, _MEAN)

    def mean(self, buckets: NDArray[np.int64]) -> Array:
        """Mean acceptance lately at these buckets, given that all before were accepted."""
        return self._mean[buckets]

    def accept(self, x: Array, position: int) -> Array:
        """[num_reqs] acceptance of the scored candidates at ``position``."""
        b = int(BUCKET_OF[min(position, LAST)])
        p = sigmoid(self.this.theta[0] * x + self.this.theta[1] + self.this.theta[2 + b])
        return np.where(np.isnan(p), self._mean[b], p)

    def walk_many(self, x: Array, positions: NDArray[np.int64], num: int) -> Array:
        """``tails.following`` for requests at different ``positions`` [num_reqs]: [num_reqs, num]; for the guard."""
        this, after = self.this.theta, self.next.theta
        buckets = BUCKET_OF[np.minimum(positions[:, None] + np.arange(num + 1), LAST)]  # [num_reqs, num + 1]
        known = ~np.isnan(x)
        expected, fade = np.where(known, x, 0.0), max(float(this[0]), 0.1)
        gain, bias = after[1] + after[2:][buckets[:, :-1]], this[1] + this[2:][buckets[:, 1:]]  # [num_reqs, num]
        out = np.empty((len(x), num))
        for j in range(num):
            out[:, j] = y = after[0] * expected + gain[:, j]
            expected = np.minimum(np.maximum((y - bias[:, j]) / fade, -MAX_LOGIT), MAX_LOGIT)
        out = sigmoid(out)
        if not known.all():
            out[~known] = self.mean(buckets[~known, 1:])
        return out

    def update(self, x: Array, labels: Array) -> None:
        """Learn from one verified batch.

        Args:
            x: [num_steps, num_reqs] log-odds of candidate k's score in row k - 1; NaN: none.
            labels: [num_steps, num_reqs] 1 accepted, 0 first rejection, NaN not observed.
        """
        if not labels.size:
            return
        buckets = np.broadcast_to(BUCKET_OF[1 : len(labels) + 1, None], labels.shape)
        seen = np.isfinite(labels)
        if not seen.any():
            return
        fade = np.exp(-seen.sum() / self._memory)
        per_bucket = np.bincount(buckets[seen], minlength=NUM_BUCKETS)
        accepted = np.bincount(buckets[seen], weights=labels[seen], minlength=NUM_BUCKETS)
        self._accepted = fade * self._accepted + accepted
        self._observed = fade * self._observed + per_bucket
        self.this.update(x[seen], buckets[seen], labels[seen])
        pairs = seen[1:]
        self.next.update(x[:-1][pairs], buckets[:-1][pairs], labels[1:][pairs])
        self._recentre()

    def _recentre(self) -> None:
        """The means anew: a bucket's own is drawn to that of all, and this to the start.

        ``next`` moves with the mean acceptance of first candidates. It learns only where drafts are long: while they
        are short for its sake alone, the mean still tells it of a better time.
        """
        common = (float(self._accepted.sum()) + _MEAN_WEIGHT * _MEAN) / (float(self._observed.sum()) + _MEAN_WEIGHT)
        self._mean = (self._accepted + _MEAN_WEIGHT * common) / (self._observed + _MEAN_WEIGHT)
        centre = logit_one(float(self._mean[0]))
        self.next.shift((1 - _CARRIES) * (centre - self._centre))
        self._centre = centre

    def update_run(self, x: list[float], accepted: int, verified: int) -> None:
        """:meth:`update` from one request's round.

        Args:
            x: log-odds of candidate 1, 2, ...; NaN: none.
            accepted: candidates accepted.
            verified: candidates verified.
        """
        num = min(accepted + 1, verified, len(x))
        if num <= 0:
            return
        buckets = [BUCKETS[min(k, LAST)] for k in range(1, num + 1)]
        labels = [1.0 if k < accepted else 0.0 for k in range(num)]
        fade = math.exp(-num / self._memory)
        self._accepted *= fade
        self._observed *= fade
        for b, label in zip(buckets, labels, strict=True):
            self._accepted[b] += label
            self._observed[b] += 1.0
        known = [k for k in range(num) if x[k] == x[k]]
        self.this.update_few([x[k] for k in known], [buckets[k] for k in known], [labels[k] for k in known])
        known = [k for k in known if k + 1 < num]
        self.next.update_few([x[k] for k in known], [buckets[k] for k in known], [labels[k + 1] for k in known])
        self._recentre()
