# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Draft logits of candidates that nobody drew: all probability on the candidate, at any temperature."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_launch, check_tensor
from .logits_summary import LOGITS
from .suffix_match import INDEX

BLOCKS = {"BLOCK_VOCAB": 4096}
OPTIONS = {"num_warps": 8}


@triton.jit(do_not_specialize=["candidates_stride", "vocab_size"])
def _one_hot_rows_kernel(
    logits_ptr,  # [max_num_reqs, K, vocab_size], out
    states_ptr,  # [num_reqs] int32 or int64
    candidates_ptr,  # [num_reqs, K] int64
    state_stride,
    step_stride,
    candidates_stride,
    vocab_size,
    BLOCK_VOCAB: tl.constexpr,
):
    """A program a part of a row; where there is no candidate it ends at once."""
    req, step = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tl.load(candidates_ptr + req * candidates_stride + step)
    if token >= 0:
        columns = tl.program_id(2) * BLOCK_VOCAB + tl.arange(0, BLOCK_VOCAB)
        row = logits_ptr + tl.load(states_ptr + req).to(tl.int64) * state_stride + step.to(tl.int64) * step_stride
        values = tl.where(columns == token, 0.0, float("-inf")).to(logits_ptr.dtype.element_ty)
        tl.store(row + columns, values, mask=columns < vocab_size)


def one_hot_rows(logits: Tensor, states: Tensor, candidates: Tensor) -> None:
    """Let the draft logits say that each of these candidates was certain. One launch; never waits.

    Args:
        logits: [max_num_reqs, K, vocab_size] float32, bfloat16 or float16, contiguous: by request state, before
            temperature (``DraftModelSpeculator.draft_logits``). Rows without a candidate stay as they are.
        states: [num_reqs] int32 or int64, the requests' states.
        candidates: [num_reqs, K] int64 of any row stride; -1: none.

    Raises:
        ValueError: one line: a tensor of another shape, dtype, device or stride.
    """
    _check("one_hot_rows", logits, states, candidates)
    check_launch("one_hot_rows", _one_hot_rows_kernel, logits.device, "one_hot_rows_torch")
    if len(states):
        vocab_size = logits.shape[2]
        _one_hot_rows_kernel[(*candidates.shape, triton.cdiv(vocab_size, BLOCKS["BLOCK_VOCAB"]))](
            logits, states, candidates, logits.stride(0), logits.stride(1), candidates.stride(0), vocab_size,
            **BLOCKS, **OPTIONS,
        )  # fmt: skip


def one_hot_rows_torch(logits: Tensor, states: Tensor, candidates: Tensor) -> None:
    """The twin of :func:`one_hot_rows`, in torch, for any device; it writes all rows of these requests anew."""
    _check("one_hot_rows_torch", logits, states, candidates)
    rows, there = logits[states.long()], (candidates >= 0)[:, :, None]  # [num_reqs, K, vocab_size], [num_reqs, K, 1]
    rows.masked_fill_(there, -torch.inf)
    at = candidates.clamp(min=0)[:, :, None]
    rows.scatter_(2, at, torch.where(there, 0.0, rows.gather(2, at)))
    logits[states.long()] = rows


def _check(owner: str, logits: Tensor, states: Tensor, candidates: Tensor) -> None:
    if logits.dim() != 3 or not logits.is_contiguous():
        raise ValueError(
            f"specdecpp: {owner}: logits have shape {list(logits.shape)} and strides {list(logits.stride())}, must be "
            "[max_num_reqs, K, vocab_size], contiguous; use the speculator's buffer"
        )
    check_tensor(owner, "logits", logits, LOGITS, logits.shape, logits.device)
    check_tensor(owner, "states", states, INDEX, (len(states),), logits.device)
    check_tensor(owner, "candidates", candidates, torch.int64, (len(states), logits.shape[1]), logits.device)
