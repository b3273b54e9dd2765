# SPDX-License-Identifier: Apache-2.0
"""Whether the cost-aware rule's estimates come true: observed candidates by estimated acceptance. No vLLM import."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from vllm_specdecpp.decision.cost_aware.drafting import CostAwareRound

NUM_BINS = 15
"""Of equal width over [0, 1], as in ``training.statistics``."""


class ReliabilityLog:
    """Sums over the observed candidates since the start, in bins of the estimate that was in force."""

    def __init__(self) -> None:
        self._sums = np.zeros((3, NUM_BINS))  # candidates, estimates, accepted

    def verified(self, round_: CostAwareRound, verified: Sequence[int | None], accepted: Sequence[int]) -> None:
        """A round has been verified; call before the rule learns from it.

        Args:
            round_: its steps done.
            verified: as in :meth:`CostAwareRule.finish`.
            accepted: likewise.
        """
        rule = round_.rule
        tells = round_.drafts & ~round_.constrained
        lengths = np.where(tells, [-1 if v is None else v for v in verified], -1)  # [num_reqs]
        wins = np.minimum(np.asarray(accepted), lengths)  # [num_reqs]
        for k, log_odds in enumerate(round_.scores[rule.lag :], start=1):
            seen = (k <= lengths) & (k <= wins + 1) & np.isfinite(log_odds)
            if seen.any():
                self._add(rule.acceptance.accept(log_odds[seen], k), k <= wins[seen])

    def _add(self, probability: NDArray[np.float64], accepted: NDArray[np.bool_]) -> None:
        index = np.minimum((probability * NUM_BINS).astype(np.int64), NUM_BINS - 1)
        for sums, weights in zip(self._sums, (np.ones_like(probability), probability, accepted), strict=True):
            sums += np.bincount(index, weights, NUM_BINS)

    def sums(self) -> dict[str, list[float]]:
        """``num`` (observed candidates), ``probability`` (their estimates' sum) and ``accepted``: [NUM_BINS] each."""
        return dict(zip(("num", "probability", "accepted"), self._sums.tolist(), strict=True))
