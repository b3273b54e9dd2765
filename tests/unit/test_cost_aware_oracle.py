# SPDX-License-Identifier: Apache-2.0
"""The host's cost-aware step decides as the oracle does, which tries out everything."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.v2.kernels.cost_aware_cases import CASES, Case, _scores, make_round, oracle_of


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_oracle_step_by_step(case: Case) -> None:
    compared = 0
    for seed in range(6):
        rng = np.random.default_rng(1000 + seed)
        round_: Any = make_round(case, rng)
        oracle = oracle_of(round_)
        for _ in range(case.max_length):
            scores = _scores(case, rng)[: case.num_reqs]
            made, decision = oracle.step(scores.tolist()), round_.step(scores)
            if made.fragile:
                break
            assert (decision.submit.tolist(), decision.go_on.tolist()) == (made.submit, made.go_on)
            ended = rng.random(case.num_reqs) < 0.1
            oracle.end(ended)
            round_.end(ended)
            np.testing.assert_allclose(oracle.survival, round_.survival)
            np.testing.assert_allclose(oracle.expected, round_.expected)
            assert oracle.explore_seconds == pytest.approx(round_.rule.explore_seconds)
            compared += 1
    assert compared >= case.max_length
