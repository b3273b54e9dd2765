# SPDX-License-Identifier: Apache-2.0
"""Residual blocks of odd sizes, and the comparison of head_block with head.ResidualBlock."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_specdecpp.head.model import ResidualBlock

CASES = [
    (1, 1, "float32"), (1, 16, "bfloat16"), (2, 17, "float32"), (5, 130, "float16"), (17, 40, "float32"),
    (33, 129, "bfloat16"), (66, 33, "float32"), (3, 260, "bfloat16"),
]  # fmt: skip
# One rounding of the result, against one after each of the module's operations.
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}


def inputs(num_reqs: int, size: int, dtype: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias, out: rows of wider buffers, whose rest is NaN."""
    generator = torch.Generator().manual_seed(num_reqs * 1000 + size)
    kind = getattr(torch, dtype)

    def rows(num: int, fill: float | None = None) -> Tensor:
        buffer = torch.full((num, size + 3), torch.nan, dtype=kind)
        view = buffer[:, :size]
        values = torch.randn(num, size, generator=generator)
        return view.copy_(values if fill is None else torch.full_like(values, fill))

    weight = rows(size)
    weight *= 2 / size**0.5
    return rows(num_reqs), weight, torch.randn(size, generator=generator).to(kind), rows(num_reqs, fill=9.0)


def check(launch: Any, num_reqs: int, size: int, dtype: str) -> None:
    """Against the module, computed in float64."""
    x, weight, bias, out = inputs(num_reqs, size, dtype)
    block = ResidualBlock(size).double().eval()
    with torch.no_grad():
        block.linear.weight.copy_(weight)
        block.linear.bias.copy_(bias)
        wanted = block(x.double())
    launch(x, weight, bias, out)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=tolerance)
