# SPDX-License-Identifier: Apache-2.0
"""cost_aware_tail and its twin decide as the oracle does, but where float32 cannot tell."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from kernels import cost_aware_device, cost_aware_params
from kernels import cost_aware_tail as module
from tests.v2.kernels.cost_aware_cases import CASES, Case, arguments, check_probe, check_rounds, make_round
from vllm_specdecpp.decision.cost_aware import drafting, logistic

LAUNCHES = [module.cost_aware_tail, module.cost_aware_tail_torch]


@pytest.mark.parametrize("launch", LAUNCHES, ids=["kernel", "twin"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_oracle_step_by_step(case: Case, launch) -> None:
    met = check_rounds(launch, case)
    assert met["steps"] > 0 and met["steps"] >= 8 * met["fragile"]


def test_the_cases_meet_everything_there_is() -> None:
    met = sum((check_rounds(module.cost_aware_tail_torch, case) for case in CASES), Counter())
    wanted = ("all go on", "some go on", "nobody goes on", "dropped", "last submitted", "explored")
    assert all(met[name] >= 5 for name in wanted), met


def test_a_probe_submits_at_the_first_step_only() -> None:
    for launch in LAUNCHES:
        check_probe(launch)


@pytest.mark.parametrize(("limit", "cheap", "drafts", "running"), [(1, 8, 2, 0), (6, 14, 6, 2)])
def test_of_equals_the_first_requests_come_first(limit, cheap, drafts, running) -> None:
    """Scores all alike, and more than ``cheap`` tokens too dear: two can submit, or two can go on."""
    for launch in LAUNCHES:
        case = Case(6, num_stop=0)
        round_ = make_round(case, np.random.default_rng(3))
        round_.limits[:], round_.drafts[:] = limit, True
        a = arguments(round_, case, np.random.default_rng(3))
        tokens = torch.arange(len(a["params"].verify_seconds))
        a["params"].verify_seconds.copy_(0.01 + 1000.0 * (tokens > cheap))
        a["params"].rate.fill_(1.0)
        launch(torch.full((9,), 0.999), torch.arange(9), 1, **a)
        assert a["draft_tokens"][:, 0].tolist() == [*range(drafts), *[-1] * (9 - drafts)]
        assert a["running"].tolist() == [1] * running + [0] * (9 - running)


def test_constants_are_those_of_the_rule() -> None:
    assert drafting._HORIZON == cost_aware_params.HORIZON
    assert cost_aware_device.MAX_LOG_ODDS.value == logistic.MAX_LOGIT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expected": torch.zeros(6, dtype=torch.float64)}, "expected is float64, must be float32"),
        ({"scores_log": torch.zeros(6, 5)}, r"scores_log has shape \[6, 5\], must be \[6, 6\]"),
        ({"widths": torch.zeros(6)}, "widths is float32, must be int32"),
        ({"lag": 2}, "lag=2 must be 0 or 1"),
        ({"step": 7}, r"step=7 must lie in 1\.\.6"),
        ({"params": cost_aware_params.CostAwareParams.allocate(5, 6, 9, [0], "cpu")}, "params.limits has room for 5"),
        ({"params": cost_aware_params.CostAwareParams.allocate(6, 5, 9, [0], "cpu")}, "params.means has room for 13"),
        ({"params": cost_aware_params.CostAwareParams.allocate(6, 6, 9, [0], "meta")}, "params are on meta"),
    ],
)
def test_misfits_are_refused_in_one_line(change, message) -> None:
    case = Case(3)
    for launch in LAUNCHES:
        rng = np.random.default_rng(0)
        a = arguments(make_round(case, rng), case, rng) | {"step": 1} | change
        with pytest.raises(ValueError, match=f"^specdecpp: {launch.__name__}: {message}") as error:
            launch(torch.ones(6), torch.arange(6), **a)
        assert "\n" not in str(error.value)


def test_too_many_requests_are_refused_by_the_kernel_alone() -> None:
    case = Case(1022, max_length=1, num_stop=0)
    rng = np.random.default_rng(0)
    a = arguments(make_round(Case(1022, max_length=1), rng), case, rng)
    module.cost_aware_tail_torch(torch.ones(1025), torch.zeros(1025, dtype=torch.int64), 1, **a)
    with pytest.raises(ValueError, match="^specdecpp: cost_aware_tail: 1025 requests in a batch, must be 1024 or"):
        module.cost_aware_tail(torch.ones(1025), torch.zeros(1025, dtype=torch.int64), 1, **a)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"limits": [1] * 5}, "limits has room for 4, must have for 5"),
        ({"this": np.ones(4)}, "this has room for 4, must have for 5"),
        ({"means": np.ones(2)}, "means has room for 2, must have for 3"),
        ({"step_seconds": np.ones(4)}, "step_seconds has room for 4, must have for 5"),
        ({"verify_seconds": np.ones(9)}, "verify_seconds has 9 entries, must have 10; allocate with max_tokens=8"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(change, message) -> None:
    params = cost_aware_params.CostAwareParams.allocate(4, 2, 9, [0, 0, 1, 2], "cpu")
    given: dict[str, Any] = {
        "limits": [1, 2], "held": False, "probe": True, "rate": 2.0, "explore_seconds": 0.5, "this": np.arange(5.0),
        "next": np.arange(5.0), "means": np.ones(3), "step_seconds": np.ones(5), "verify_seconds": np.ones(10),
    }  # fmt: skip
    params.load(**given)
    assert params.limits.tolist() == [1, 2, 0, 0] and params.num_reqs.item() == 2 and params.probe.item() == 1
    assert params.this.tolist() == [3, 3, 4, 5, 5, 5, 5, 5, 5, 5] and params.slopes.tolist() == [0, 0]
    with pytest.raises(ValueError, match=f"^specdecpp: CostAwareParams.load: {message}"):
        params.load(**given | change)
    with pytest.raises(ValueError, match="^specdecpp: CostAwareParams: max_length=0 must be 1 or more"):
        cost_aware_params.CostAwareParams.allocate(4, 0, 9, [0], "cpu")
