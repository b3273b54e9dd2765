# SPDX-License-Identifier: Apache-2.0
"""suffix_match, take_runs, behind_drafts and one_hot_rows, and their twins."""

from __future__ import annotations

import pytest
import torch

from tests.v2.kernels.runs_cases import check_behind, check_matches, check_others, check_rows, check_takes
from vllm_specdecpp.decision.cost_aware import device_runs
from vllm_specdecpp.kernels import runs
from vllm_specdecpp.kernels.one_hot_rows import one_hot_rows, one_hot_rows_torch
from vllm_specdecpp.kernels.suffix_cache import match_others, match_others_torch
from vllm_specdecpp.kernels.suffix_match import suffix_match, suffix_match_torch


@pytest.mark.parametrize("launch", [suffix_match, suffix_match_torch], ids=["kernel", "twin"])
def test_matches_are_those_of_model_runner_v1(launch) -> None:
    check_matches(launch)


@pytest.mark.parametrize("launch", [match_others, match_others_torch], ids=["kernel", "twin"])
def test_more_that_matches_in_what_others_emitted_wins(launch) -> None:
    check_others(launch)


def test_nothing_is_read_of_a_row_that_asks_nothing() -> None:
    """As in a dummy run: its state is -1."""
    none = torch.full((1,), -1), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    starts, matches = torch.empty(1, dtype=torch.int64), torch.empty(1, dtype=torch.int32)
    suffix_match(torch.zeros(2, 9, dtype=torch.int32), *none, starts=starts, matches=matches)
    assert matches.tolist() == [0]


@pytest.mark.parametrize("launch", [runs.take_runs, device_runs.take_runs], ids=["kernel", "twin"])
def test_a_device_takes_what_the_host_takes(launch) -> None:
    check_takes(launch)


@pytest.mark.parametrize("launch", [runs.behind_drafts, device_runs.behind_drafts], ids=["kernel", "twin"])
def test_what_stands_in_front_of_runs_behind_drafts(launch) -> None:
    check_behind(launch)


@pytest.mark.parametrize("launch", [one_hot_rows, one_hot_rows_torch], ids=["kernel", "twin"])
def test_a_run_was_certain(launch) -> None:
    check_rows(launch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(4, 9)}, "tokens is float32, must be int32"),
        ({"last": torch.zeros(3, dtype=torch.int64)}, r"last has shape \[3\], must be \[2\]"),
        ({"limits": torch.zeros(4, dtype=torch.int32)[::2]}, r"limits has strides \[2\]"),
    ],
)
def test_misfits_are_refused_in_one_line(change, message) -> None:
    for launch in (suffix_match, suffix_match_torch):
        a = {
            "tokens": torch.zeros(4, 9, dtype=torch.int32), "states": torch.zeros(2, dtype=torch.int64),
            "last": torch.zeros(2, dtype=torch.int64), "limits": torch.zeros(2, dtype=torch.int32),
            "starts": torch.zeros(2, dtype=torch.int64), "matches": torch.zeros(2, dtype=torch.int32),
        } | change  # fmt: skip
        with pytest.raises(ValueError, match=f"^specdecpp: {launch.__name__}: {message}") as error:
            launch(**a)
        assert "\n" not in str(error.value)
