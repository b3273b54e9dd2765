# SPDX-License-Identifier: Apache-2.0
"""What a launcher asks of its tensors before it hands their addresses to a kernel. Every error is one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

FLAG = (torch.int32, torch.bool)
"""A yes or no on the device; CUDA's IF nodes read a bool."""


def check_tensor(
    owner: str, name: str, tensor: Tensor, dtypes: torch.dtype | Sequence[torch.dtype], shape: Sequence[int],
    device: torch.device,
) -> None:  # fmt: skip
    """Refuse a tensor that the kernel would misread.

    The last dimension must be contiguous; rows of a matrix may lie apart, but not overlap.

    Args:
        owner: the launcher.
        name: of its argument.
        tensor: the argument.
        dtypes: one, or several that are allowed.
        shape: what it must be.
        device: of the launch.

    Raises:
        ValueError: another dtype, shape or device, or strides that the kernel does not follow.
    """
    allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
    if tensor.dtype not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise ValueError(f"specdecpp: {owner}: {name} is {_name(tensor.dtype)}, must be {names}; convert it first")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"specdecpp: {owner}: {name} has shape {list(tensor.shape)}, must be {list(shape)}; slice all to num_reqs"
        )
    if tensor.device != device:
        raise ValueError(f"specdecpp: {owner}: {name} is on {tensor.device}, but scores on {device}; use one device")
    if tensor.numel() == 0:
        return
    strides, sizes = tensor.stride(), tensor.shape
    gaps = sizes[-1] > 1 and strides[-1] != 1
    overlap = tensor.dim() == 2 and sizes[0] > 1 and strides[0] < sizes[1]
    if gaps or overlap:
        raise ValueError(
            f"specdecpp: {owner}: {name} has strides {list(strides)}, must have contiguous rows that do not overlap; "
            "pass .contiguous()"
        )


def check_launch(owner: str, kernel: Any, device: torch.device, twin: str) -> None:
    """Refuse a launch that Triton would end with an obscure error; ``twin`` does the same in torch.

    Raises:
        ValueError: tensors that are not on a GPU, and no interpreter.
    """
    if device.type == "cpu" and isinstance(kernel, triton.JITFunction):
        raise ValueError(
            f"specdecpp: {owner}: tensors are on cpu, must be on a GPU; call {twin}, or set TRITON_INTERPRET=1 before "
            "triton is imported"
        )


def check_step(owner: str, step: int, max_length: int) -> None:
    """Refuse a step that has no column.

    Raises:
        ValueError: outside 1..max_length.
    """
    if not 1 <= step <= max_length:
        raise ValueError(
            f"specdecpp: {owner}: step={step} must lie in 1..{max_length}; draft_tokens has a column for each step"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
