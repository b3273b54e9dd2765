# SPDX-License-Identifier: Apache-2.0
"""Online calibration: acceptance probabilities from scores, learnt while serving.

Only observed candidates teach: the accepted ones and the first rejected one of a round. What the target would have said
of later ones is unknown, and leaving them out biases nothing: whether a candidate is observed depends on the candidates
before it, whose scores and outcomes came first.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_specdecpp.decision.cost_aware.logistic import (
    BUCKET_OF,
    BUCKETS,
    LAST,
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
    says. So a high score fades to the usual acceptance at the rate at which scores were seen to. What is usual differs
    from one request to another: for ``next`` its record adds to the score (``Admitted.levels``).

    Where there is no score (NaN, a lagged estimator's first step) the mean acceptance at that position stands in.

    Args:
        memory: observed candidates after which an old one counts 1/e.

    Attributes:
        means: [NUM_BUCKETS] acceptance lately, given that all before were accepted.
    """

    def __init__(self, memory: float = 1500.0) -> None:
        self._memory = memory
        self.this = OnlineLogistic(memory=memory)
        # Before anything was seen: most of the way back to the mean acceptance, which _recentre follows.
        self._centre = logit_one(_MEAN)
        self.next = OnlineLogistic(_CARRIES, (1 - _CARRIES) * self._centre, memory, _NEXT_STIFFNESS)
        # Per bucket, faded: observed candidates, and accepted ones.
        self._observed, self._accepted = np.zeros(NUM_BUCKETS), np.zeros(NUM_BUCKETS)
        self.means = np.full(NUM_BUCKETS, _MEAN)

    def accept(self, x: Array, position: NDArray[np.int64] | int) -> Array:
        """[num_reqs] acceptance of the scored candidates at ``position``, one for all or one for each."""
        b = bucket(position)
        p = sigmoid(self.this.theta[0] * x + self.this.theta[1] + self.this.theta[2 + b])
        return np.where(np.isnan(p), self.means[b], p)

    def update(self, x: Array, labels: Array, levels: Array | None = None) -> None:
        """Learn from one verified batch.

        Args:
            x: [num_steps, num_reqs] log-odds of candidate k's score in row k - 1; NaN: none.
            labels: [num_steps, num_reqs] 1 accepted, 0 first rejection, NaN not observed.
            levels: [num_reqs] of each request before the round (``Admitted.levels``); None: 0.
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
        shown = x if levels is None else x + levels
        self.next.update(shown[:-1][pairs], buckets[:-1][pairs], labels[1:][pairs])
        self._recentre()

    def _recentre(self) -> None:
        """The means anew: a bucket's own is drawn to that of all, and this to the start.

        ``next`` moves with the mean acceptance of first candidates. It learns only where drafts are long: while they
        are short for its sake alone, the mean still tells it of a better time.
        """
        common = (float(self._accepted.sum()) + _MEAN_WEIGHT * _MEAN) / (float(self._observed.sum()) + _MEAN_WEIGHT)
        self.means = (self._accepted + _MEAN_WEIGHT * common) / (self._observed + _MEAN_WEIGHT)
        centre = logit_one(float(self.means[0]))
        self.next.shift((1 - _CARRIES) * (centre - self._centre))
        self._centre = centre

    def update_run(self, x: list[float], accepted: int, verified: int, level: float = 0.0) -> None:
        """:meth:`update` from one request's round.

        Args:
            x: log-odds of candidate 1, 2, ...; NaN: none.
            accepted: candidates accepted.
            verified: candidates verified.
            level: of the request before the round.
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
        self.next.update_few([x[k] + level for k in known], [buckets[k] for k in known], [labels[k + 1] for k in known])
        self._recentre()

    def state(self) -> dict[str, Any]:
        """What was learnt, as JSON."""
        return {
            "this": self.this.state(),
            "next": self.next.state(),
            "centre": self._centre,
            "observed": self._observed.tolist(),
            "accepted": self._accepted.tolist(),
        }

    def restore(self, state: dict[str, Any], weight: float = 1.0) -> None:
        """Take up :meth:`state`; ``weight`` in [0, 1] says how much it still counts."""
        self.this.restore(state["this"], weight)
        self.next.restore(state["next"], weight)
        self._centre = float(state["centre"])
        self._observed = weight * np.array(state["observed"], dtype=np.float64)
        self._accepted = weight * np.array(state["accepted"], dtype=np.float64)
        self._recentre()
