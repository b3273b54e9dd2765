# SPDX-License-Identifier: Apache-2.0
"""The sums behind the calibration error: which candidates count, at which estimate, in which bin."""

from __future__ import annotations

import numpy as np
import pytest

from tests.standings import standings
from vllm_specdecpp.decision.cost_aware import CostAwareRule, CostModel
from vllm_specdecpp.decision.cost_aware.drafting import CostAwareRound
from vllm_specdecpp.decision.cost_aware.reliability import NUM_BINS, ReliabilityLog

CHEAP = ({1: 1e-6, 4: 1e-6}, {1: 1e-6, 4: 1e-6}, {1: 0.1, 64: 0.1})
"""Seconds of the draft's first pass, its steps and the verification: drafting always pays."""


def drafted(lag: int, scores: list[list[float]]) -> CostAwareRound:
    """A round whose steps saw ``scores`` [num_steps][num_reqs]; its log-odds are put there as the rule keeps them."""
    rule = CostAwareRule(CostModel(*CHEAP), 8, lag=lag)
    round_ = rule.begin(standings([f"r{i}" for i in range(len(scores[0]))], [8] * len(scores[0])))
    for column in scores:
        p = np.array(column)
        round_.scores.append(np.log(p / (1 - p)))
    round_.lengths[:] = 8
    return round_


def expected(pairs: list[tuple[float, int]]) -> dict[str, list[float]]:
    sums = np.zeros((3, NUM_BINS))
    for probability, accepted in pairs:
        sums[:, min(int(probability * NUM_BINS), NUM_BINS - 1)] += (1, probability, accepted)
    return dict(zip(("num", "probability", "accepted"), sums.tolist(), strict=True))


def close(log: ReliabilityLog, pairs: list[tuple[float, int]]) -> bool:
    want = expected(pairs)
    return all(np.allclose(values, want[key]) for key, values in log.sums().items())


@pytest.mark.parametrize("lag", [0, 1])
def test_accepted_and_first_rejected_candidates_count(lag: int) -> None:
    """Request 0: two accepted, the third rejected, the fourth unknown. Request 1: both accepted. 2: not known."""
    columns = [[0.9, 0.8, 0.7], [0.6, 0.95, 0.7], [0.4, 0.3, 0.7], [0.2, 0.3, 0.7]]
    log = ReliabilityLog()
    # A lagged score comes one step later.
    log.verified(drafted(lag, [[np.nan] * 3] * lag + columns), [4, 2, None], [2, 2, 5])
    assert close(log, [(0.9, 1), (0.6, 1), (0.4, 0), (0.8, 1), (0.95, 1)])


def test_the_estimate_is_the_calibrated_one() -> None:
    round_ = drafted(0, [[0.5]])
    round_.rule.acceptance.this.theta[1] = 2.0  # common intercept
    log = ReliabilityLog()
    log.verified(round_, [1], [0])
    assert close(log, [(1 / (1 + np.exp(-2.0)), 0)])


def test_rounds_add_up_and_scores_that_are_none_do_not_count() -> None:
    log = ReliabilityLog()
    assert close(log, [])
    log.verified(drafted(0, [[0.5, np.nan]]), [1, 1], [1, 0])
    log.verified(drafted(0, [[0.5, 0.5]]), [0, 1], [0, 0])  # nothing was verified of request 0
    assert close(log, [(0.5, 1), (0.5, 0)])


def test_certainty_belongs_to_the_last_bin() -> None:
    round_ = drafted(0, [[0.5]])
    round_.rule.acceptance.this.theta[1] = 500.0
    log = ReliabilityLog()
    log.verified(round_, [1], [1])
    assert log.sums()["num"] == [0.0] * (NUM_BINS - 1) + [1.0]
