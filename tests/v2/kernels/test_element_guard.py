# SPDX-License-Identifier: Apache-2.0
"""The guard sees what it is for."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests.v2.kernels.element_guard import OutOfBounds


@triton.jit
def _copy_kernel(source_ptr, out_ptr, size, stride, OFFSET: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    values = tl.load(source_ptr + lanes * stride, mask=lanes < size, other=0)
    tl.store(out_ptr + lanes + OFFSET, values, mask=lanes < size)


def copy(source: torch.Tensor, out: torch.Tensor, size: int, offset: int = 0) -> None:
    _copy_kernel[(1,)](source, out, size, source.stride(0), OFFSET=offset, BLOCK=16)


def test_what_stays_inside_passes() -> None:
    source, out = torch.arange(20)[::2], torch.zeros(12, dtype=torch.int64)
    copy(source, out[1:11], 10)
    assert out.tolist() == [0, *range(0, 20, 2), 0]


def test_a_load_one_too_far_is_seen() -> None:
    with pytest.raises(OutOfBounds, match="load: 1 of 11 lanes"):
        copy(torch.arange(20)[:10], torch.zeros(12, dtype=torch.int64), 11)


def test_a_store_beside_the_view_is_seen_though_the_storage_goes_on() -> None:
    for offset in (-1, 1):
        with pytest.raises(OutOfBounds, match="store: 1 of 10 lanes"):
            copy(torch.arange(10), torch.zeros(12, dtype=torch.int64)[1:11], 10, offset)


def test_a_gap_between_elements_is_out_of_bounds() -> None:
    with pytest.raises(OutOfBounds, match="load: 5 of 10 lanes"):
        _copy_kernel[(1,)](torch.arange(20)[::2], torch.zeros(10, dtype=torch.int64), 10, 1, OFFSET=0, BLOCK=16)
