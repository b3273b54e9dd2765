# SPDX-License-Identifier: Apache-2.0
"""threshold_tail and a loop over the requests: the same to the last bit, step by step."""

from __future__ import annotations

import pytest
import torch

from tests.v2.kernels.threshold_cases import CASES, Case, arguments, check_rounds
from vllm_specdecpp.decision import tails
from vllm_specdecpp.kernels import threshold_tail as module


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_a_loop_step_by_step(case: Case) -> None:
    check_rounds(module.threshold_tail, case)


def test_threshold_of_one_or_more_never_stops() -> None:
    for launch in (module.threshold_tail, tails.threshold_tail):
        a = arguments(Case(num_reqs=3))
        a["threshold"].fill_(1.0)
        a["stop_token_ids"].fill_(-1)
        a["max_lengths"].fill_(2)
        a["running"].fill_(1)
        launch(torch.full((3,), torch.nan), torch.tensor([1, 2, 3]), 1, **a, scored=True)
        assert a["running"].tolist() == [1, 1, 1] and a["survival"].tolist() == [0, 0, 0]


def test_flag_may_be_a_bool() -> None:
    for launch in (module.threshold_tail, tails.threshold_tail):
        a = arguments(Case(num_reqs=2, num_stop=0))
        a["any_running"] = torch.zeros(1, dtype=torch.bool)
        a["max_lengths"].fill_(2)
        launch(torch.ones(2), torch.tensor([1, 2]), 1, **a, scored=True)
        assert bool(a["any_running"])
        launch(torch.ones(2), torch.tensor([1, 2]), 2, **a, scored=True)
        assert not bool(a["any_running"])


def test_other_columns_and_the_rest_of_a_wider_buffer_stay_as_they_are() -> None:
    buffer = torch.full((3, 8), 77)
    a = arguments(Case(num_reqs=3)) | {"draft_tokens": buffer[:, 1:6]}
    a["running"].copy_(torch.tensor([1, 0, 1]))
    module.threshold_tail(torch.ones(3), torch.tensor([5, 6, 7]), 2, **a, scored=True)
    assert buffer[:, 2].tolist() == [5, -1, 7]
    buffer[:, 2] = 77
    assert bool((buffer == 77).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": torch.zeros(3)}, "lengths is float32, must be int32"),
        ({"survival": torch.ones(4)}, r"survival has shape \[4\], must be \[3\]"),
        ({"running": torch.ones(6, dtype=torch.int32)[::2]}, r"running has strides \[2\]"),
        ({"draft_tokens": torch.zeros(5, 3, dtype=torch.int64).T}, r"draft_tokens has strides \[1, 3\]"),
        ({"draft_tokens": torch.zeros(1, 5, dtype=torch.int64).expand(3, 5)}, r"draft_tokens has strides \[0, 1\]"),
        ({"threshold": torch.ones(1, dtype=torch.float64)}, "threshold is float64, must be float32"),
        ({"any_running": torch.zeros(1)}, "any_running is float32, must be int32 or bool"),
        ({"max_lengths": torch.ones(3, dtype=torch.int32, device="meta")}, "max_lengths is on meta"),
        ({"step": 0}, r"step=0 must lie in 1\.\.5"),
        ({"step": 6}, r"step=6 must lie in 1\.\.5"),
    ],
)
def test_misfits_are_refused_in_one_line(change, message) -> None:
    a = arguments(Case(num_reqs=3, max_length=5)) | {"step": 1} | change
    with pytest.raises(ValueError, match=f"^specdecpp: threshold_tail: {message}") as error:
        module.threshold_tail(torch.ones(3), torch.tensor([1, 2, 3]), **a, scored=True)
    assert "\n" not in str(error.value)
