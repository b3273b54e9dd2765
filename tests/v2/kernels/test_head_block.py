# SPDX-License-Identifier: Apache-2.0
"""head_block, its twin, and the module in head.py."""

from __future__ import annotations

import pytest
import torch

from kernels import head_block as module
from tests.v2.kernels.head_cases import CASES, check, inputs

LAUNCHES = [module.head_block, module.head_block_torch]


@pytest.mark.parametrize("launch", LAUNCHES, ids=["kernel", "twin"])
@pytest.mark.parametrize(("num_reqs", "size", "dtype"), CASES)
def test_equals_the_modules_block(num_reqs, size, dtype, launch) -> None:
    check(launch, num_reqs, size, dtype)


def test_no_request_is_no_launch() -> None:
    for launch in LAUNCHES:
        launch(*inputs(0, 8, "float32"))


@pytest.mark.parametrize(
    ("index", "tensor", "message"),
    [
        (0, torch.zeros(8), r"x has shape \[8\], must be \[num_reqs, size\]"),
        (0, torch.zeros(3, 8, dtype=torch.float64), "x is float64, must be float32 or bfloat16 or float16"),
        (1, torch.zeros(8, 7), r"weight has shape \[8, 7\], must be \[8, 8\]"),
        (1, torch.zeros(8, 8).T[:, :].as_strided((8, 8), (1, 8)), r"weight has strides \[1, 8\]"),
        (2, torch.zeros(8, dtype=torch.bfloat16), "bias is bfloat16, must be float32"),
        (3, torch.zeros(4, 8), r"out has shape \[4, 8\], must be \[3, 8\]"),
    ],
)
def test_misfits_are_refused_in_one_line(index, tensor, message) -> None:
    for launch in LAUNCHES:
        a = list(inputs(3, 8, "float32"))
        a[index] = tensor
        with pytest.raises(ValueError, match=f"^specdecpp: {launch.__name__}: {message}") as error:
            launch(*a)
        assert "\n" not in str(error.value)


def test_out_may_not_be_the_input() -> None:
    x, weight, bias, _ = inputs(3, 8, "float32")
    for launch in LAUNCHES:
        with pytest.raises(ValueError, match=f"^specdecpp: {launch.__name__}: out shares memory with x"):
            launch(x, weight, bias, x)
