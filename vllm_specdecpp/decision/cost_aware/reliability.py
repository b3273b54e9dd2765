# SPDX-License-Identifier: Apache-2.0
"""Whether the cost-aware rule's estimates come true: observed candidates by estimated acceptance. No vLLM import."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from vllm_specdecpp.decision.cost_aware.drafting import CostAwareRound

NUM_BINS = 15
"""Of equal width over [0, 1], as in ``training.statistics``."""


class ReliabilityLog:
    """Sums over the observed candidates since the start, in bins of the estimate that was in force."""

    def __init__(self) -> None:
        self._sums = [[0.0] * NUM_BINS for _ in range(3)]  # candidates, estimates, accepted

    def verified(self, round_: CostAwareRound, verified: Sequence[int | None], accepted: Sequence[int]) -> None:
        """A round has been verified; call before the rule learns from it.

        Args:
            round_: its steps done.
            verified: as in :meth:`CostAwareRule.finish`.
            accepted: likewise.
        """
        tells = (round_.drafts & ~round_.constrained).tolist()
        looks, estimates = round_.looks, round_.estimates
        candidates, sums, wins = self._sums
        drafted = np.minimum(round_.lengths, len(looks)).tolist()  # a free run may have gone on behind them
        for row, (num, won, told, most) in enumerate(zip(verified, accepted, tells, drafted, strict=True)):
            if num is None or not told:
                continue
            for k in range(min(won + 1, num, most)):
                if math.isfinite(looks[k][row]):
                    estimate = estimates[k][row]
                    index = min(int(estimate * NUM_BINS), NUM_BINS - 1)
                    candidates[index] += 1.0
                    sums[index] += estimate
                    wins[index] += k < won

    def sums(self) -> dict[str, list[float]]:
        """``num`` (observed candidates), ``probability`` (their estimates' sum) and ``accepted``: [NUM_BINS] each."""
        return dict(zip(("num", "probability", "accepted"), map(list, self._sums), strict=True))
