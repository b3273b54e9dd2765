# SPDX-License-Identifier: Apache-2.0
"""cost_aware_tail decides as the oracle does, but where float32 cannot tell."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.v2.kernels.cost_aware_cases import CASES, Case, arguments, check_free, check_rounds, make_round
from vllm_specdecpp.decision import tails
from vllm_specdecpp.decision.tail_params import CostAwareParams
from vllm_specdecpp.kernels.cost_aware_tail import cost_aware_tail


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_oracle_step_by_step(case: Case) -> None:
    met = check_rounds(cost_aware_tail, case, range(2))
    assert met["steps"] > 0 and met["steps"] >= 8 * met["fragile"]


def test_at_price_0_all_is_drafted() -> None:
    check_free(cost_aware_tail)


@pytest.mark.parametrize(("limit", "cheap", "drafts", "running"), [(1, 8, 2, 0), (6, 14, 6, 2)])
def test_of_equals_the_first_requests_come_first(limit, cheap, drafts, running) -> None:
    """Scores all alike, and more than ``cheap`` tokens too dear: two can submit, or two can go on."""
    for launch in (cost_aware_tail, tails.cost_aware_tail):
        case = Case(6, num_stop=0)
        round_ = make_round(case, np.random.default_rng(3))
        round_.limits[:], round_.drafts[:], round_.levels[:] = limit, True, 0.0
        a = arguments(round_, case, np.random.default_rng(3))
        tokens = torch.arange(len(a["params"].verify_seconds))
        a["params"].verify_seconds.copy_(0.01 + 1000.0 * (tokens > cheap))
        a["params"].price.fill_(1.0)
        launch(torch.full((9,), 0.999), torch.arange(9), 1, **a)
        assert a["draft_tokens"][:, 0].tolist() == [*range(drafts), *[-1] * (9 - drafts)]
        assert a["running"].tolist() == [1] * running + [0] * (9 - running)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expected": torch.zeros(6, dtype=torch.float64)}, "expected is float64, must be float32"),
        ({"scores_log": torch.zeros(6, 5)}, r"scores_log has shape \[6, 5\], must be \[6, 6\]"),
        ({"widths": torch.zeros(6)}, "widths is float32, must be int32"),
        ({"lag": 2}, "lag=2 must be 0 or 1"),
        ({"step": 7}, r"step=7 must lie in 1\.\.6"),
        ({"params": CostAwareParams.allocate(5, 6, 9, [0], "cpu")}, "params.limits has room for 5"),
        ({"params": CostAwareParams.allocate(6, 5, 9, [0], "cpu")}, "params.means has room for 13"),
        ({"params": CostAwareParams.allocate(6, 6, 9, [0], "meta")}, "params are on meta"),
    ],
)
def test_misfits_are_refused_in_one_line(change, message) -> None:
    case = Case(3)
    rng = np.random.default_rng(0)
    a = arguments(make_round(case, rng), case, rng) | {"step": 1} | change
    with pytest.raises(ValueError, match=f"^specdecpp: cost_aware_tail: {message}") as error:
        cost_aware_tail(torch.ones(6), torch.arange(6), **a)
    assert "\n" not in str(error.value)


def test_too_many_requests_are_refused_by_the_kernel_alone() -> None:
    case = Case(1022, max_length=1, num_stop=0)
    rng = np.random.default_rng(0)
    a = arguments(make_round(Case(1022, max_length=1), rng), case, rng)
    tails.cost_aware_tail(torch.ones(1025), torch.zeros(1025, dtype=torch.int64), 1, **a)
    with pytest.raises(ValueError, match="^specdecpp: cost_aware_tail: 1025 requests in a batch, must be 1024 or"):
        cost_aware_tail(torch.ones(1025), torch.zeros(1025, dtype=torch.int64), 1, **a)
