# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""The head's residual block for the small batches of drafting, fused: ``head.ResidualBlock`` without dropout."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_launch, check_tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_BLOCK_REQS = 64


def sizes(num_reqs: int, dtype: torch.dtype) -> dict[str, int]:
    """Block sizes for a batch. Narrow in outputs: the weight is what takes time, and all processors must read it."""
    block = min(max(16, triton.next_power_of_2(num_reqs)), MAX_BLOCK_REQS)
    # Without tensor cores, as float32 is multiplied here, a wider block would not fit into the registers.
    return {"BLOCK_REQS": block, "BLOCK_OUT": 16, "BLOCK_IN": 32 if dtype == torch.float32 else 128}


OPTIONS = {"num_warps": 4, "num_stages": 4}


@triton.jit(do_not_specialize=["num_reqs"])
def _head_block_kernel(
    x_ptr,  # [num_reqs, size]
    weight_ptr,  # [size, size], as nn.Linear has it: outputs by inputs
    bias_ptr,  # [size]
    out_ptr,  # [num_reqs, size], out
    x_stride,
    weight_stride,
    out_stride,
    num_reqs,
    size,
    BLOCK_REQS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """x + SiLU(W x + b) (SpecDec++, arXiv:2405.19715), summed in float32 and rounded once."""
    reqs = tl.program_id(1) * BLOCK_REQS + tl.arange(0, BLOCK_REQS)
    outs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_req, is_out = reqs < num_reqs, outs < size
    x_rows = x_ptr + reqs.to(tl.int64)[:, None] * x_stride
    weight_rows = weight_ptr + outs.to(tl.int64)[None, :] * weight_stride
    acc = tl.zeros((BLOCK_REQS, BLOCK_OUT), dtype=tl.float32)
    for start in range(0, size, BLOCK_IN):
        ins = start + tl.arange(0, BLOCK_IN)
        is_in = ins < size
        x = tl.load(x_rows + ins[None, :], mask=is_req[:, None] & is_in[None, :], other=0.0)
        weight = tl.load(weight_rows + ins[:, None], mask=is_in[:, None] & is_out[None, :], other=0.0)
        # "ieee": float32 weights are not cut to tf32.
        acc = tl.dot(x, weight, acc, input_precision="ieee")
    acc += tl.load(bias_ptr + outs, mask=is_out, other=0.0).to(tl.float32)[None, :]
    inside = is_req[:, None] & is_out[None, :]
    residual = tl.load(x_rows + outs[None, :], mask=inside, other=0.0).to(tl.float32)
    out = residual + acc / (1.0 + tl.exp(-acc))
    tl.store(out_ptr + reqs.to(tl.int64)[:, None] * out_stride + outs[None, :], out, mask=inside)


def head_block(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """out = x + SiLU(x W^T + b). One launch; never waits.

    Args:
        x: [num_reqs, size] float32, bfloat16 or float16, of any row stride.
        weight: [size, size] of the same dtype, ``nn.Linear``'s.
        bias: [size] of the same dtype.
        out: [num_reqs, size] of the same dtype; not ``x``, which other programs still read.

    Raises:
        ValueError: one line: a tensor of another shape, dtype, device or stride, or ``out`` on top of an input.
    """
    _check("head_block", x, weight, bias, out)
    check_launch("head_block", _head_block_kernel, x.device, "head_block_torch")
    num_reqs, size = x.shape
    if num_reqs == 0:
        return
    blocks = sizes(num_reqs, x.dtype)
    grid = (triton.cdiv(size, blocks["BLOCK_OUT"]), triton.cdiv(num_reqs, blocks["BLOCK_REQS"]))
    _head_block_kernel[grid](
        x, weight, bias, out, x.stride(0), weight.stride(0), out.stride(0), num_reqs, size, **blocks, **OPTIONS
    )


def head_block_torch(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """The twin of :func:`head_block`, in torch, for any device; rounds to the dtype after each operation."""
    _check("head_block_torch", x, weight, bias, out)
    out.copy_(x + torch.nn.functional.silu(torch.nn.functional.linear(x, weight, bias)))


def _check(owner: str, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    if x.dim() != 2 or x.shape[1] < 1:
        raise ValueError(f"specdecpp: {owner}: x has shape {list(x.shape)}, must be [num_reqs, size]; reshape it")
    num_reqs, size = x.shape
    check_tensor(owner, "x", x, DTYPES, (num_reqs, size), x.device)
    check_tensor(owner, "weight", weight, x.dtype, (size, size), x.device)
    check_tensor(owner, "bias", bias, x.dtype, (size,), x.device)
    check_tensor(owner, "out", out, x.dtype, (num_reqs, size), x.device)
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if out.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() and out.numel():
            raise ValueError(f"specdecpp: {owner}: out shares memory with {name}; give it memory of its own")
