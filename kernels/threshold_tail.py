# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""What follows the draw in every draft step under a threshold rule, in one launch: ``decision.tails``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import FLAG, check_launch, check_step, check_tensor
from .stop_tokens import ends_draft

BLOCKS = {"BLOCK_REQS": 256, "BLOCK_STOP": 4}
# Survival decides against a threshold: no fused multiply-add, so that it is torch's to the last bit.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


# Nothing is specialised on a number: what was compiled at warm-up serves every step and batch size, so that no graph
# capture meets the compiler.
@triton.jit(do_not_specialize=["num_reqs", "num_stop", "stop_stride", "draft_stride", "step", "min_length"])
def _threshold_tail_kernel(
    scores_ptr,  # [num_reqs] float32
    token_ids_ptr,  # [num_reqs] int64
    survival_ptr,  # [num_reqs] float32, in and out
    lengths_ptr,  # [num_reqs] int32, in and out
    running_ptr,  # [num_reqs] int32, in and out
    max_lengths_ptr,  # [num_reqs] int32
    threshold_ptr,  # [1] float32
    stop_token_ids_ptr,  # [num_reqs, num_stop] int64
    draft_tokens_ptr,  # [num_reqs, K] int64, out: column step - 1
    any_running_ptr,  # [1] int32 or bool, out
    num_reqs,
    num_stop,
    stop_stride,
    draft_stride,
    step,
    min_length,
    SCORED: tl.constexpr,
    BLOCK_REQS: tl.constexpr,
    BLOCK_STOP: tl.constexpr,
):
    """S_k = S_{k-1} * score; the draft ends with candidate k if 1 - S_k > h (SpecDec++, arXiv:2405.19715).

    One program for the whole batch: "does anybody go on" needs no atomics, and no zeroing before the launch.
    """
    threshold = tl.load(threshold_ptr)
    any_running = 0
    for start in range(0, num_reqs, BLOCK_REQS):
        reqs = start + tl.arange(0, BLOCK_REQS)
        inside = reqs < num_reqs
        running = tl.load(running_ptr + reqs, mask=inside, other=0) != 0
        token_ids = tl.load(token_ids_ptr + reqs, mask=inside, other=-1)
        survival = tl.load(survival_ptr + reqs, mask=inside, other=1.0)
        if SCORED:
            score = tl.load(scores_ptr + reqs, mask=inside, other=1.0)
            # A broken score, a NaN, ends the draft.
            score = tl.where(score == score, tl.minimum(tl.maximum(score, 0.0), 1.0), 0.0)
            survival = tl.where(running, survival * score, survival)
            tl.store(survival_ptr + reqs, survival, mask=inside)
        last = (1.0 - survival > threshold) & (step >= min_length)

        # Drawn means submitted, whatever the token.
        lengths = tl.load(lengths_ptr + reqs, mask=inside, other=0) + running.to(tl.int32)
        tl.store(lengths_ptr + reqs, lengths, mask=inside)
        column = reqs.to(tl.int64) * draft_stride + (step - 1)
        tl.store(draft_tokens_ptr + column, tl.where(running, token_ids, -1), mask=inside)

        max_lengths = tl.load(max_lengths_ptr + reqs, mask=inside, other=0)
        ends = ends_draft(token_ids, reqs, inside, stop_token_ids_ptr, stop_stride, num_stop, BLOCK_STOP)
        go_on = (running & (lengths < max_lengths) & (ends == 0) & (last == 0)).to(tl.int32)
        tl.store(running_ptr + reqs, go_on, mask=inside)
        any_running |= tl.max(go_on, axis=0)
    tl.store(any_running_ptr, any_running != 0)


def threshold_tail(
    scores: Tensor,
    token_ids: Tensor,
    step: int,
    *,
    survival: Tensor,
    lengths: Tensor,
    running: Tensor,
    max_lengths: Tensor,
    min_length: int,
    threshold: Tensor,
    stop_token_ids: Tensor,
    draft_tokens: Tensor,
    any_running: Tensor,
    scored: bool,
) -> None:
    """``decision.tails.threshold_tail`` in one launch, with the same arguments. In place; never waits.

    ``draft_tokens`` may have any row stride.

    Raises:
        ValueError: one line: a tensor of another shape, dtype, device or stride, or a step without a column.
    """
    num_reqs, num_stop = _check(
        "threshold_tail", scores, token_ids, step, survival, lengths, running, max_lengths, threshold, stop_token_ids,
        draft_tokens, any_running,
    )  # fmt: skip
    check_launch("threshold_tail", _threshold_tail_kernel, scores.device, "decision.tails.threshold_tail")
    _threshold_tail_kernel[(1,)](
        scores, token_ids, survival, lengths, running, max_lengths, threshold, stop_token_ids, draft_tokens,
        any_running, num_reqs, num_stop, stop_token_ids.stride(0), draft_tokens.stride(0), step, min_length,
        SCORED=scored, **BLOCKS, **OPTIONS,
    )  # fmt: skip


def _check(
    owner: str, scores: Tensor, token_ids: Tensor, step: int, survival: Tensor, lengths: Tensor, running: Tensor,
    max_lengths: Tensor, threshold: Tensor, stop_token_ids: Tensor, draft_tokens: Tensor, any_running: Tensor,
) -> tuple[int, int]:  # fmt: skip
    """num_reqs and num_stop of arguments that fit together."""
    device, num_reqs = scores.device, scores.shape[0]
    for name, tensor, dtype in (
        ("scores", scores, torch.float32), ("token_ids", token_ids, torch.int64), ("survival", survival, torch.float32),
        ("lengths", lengths, torch.int32), ("running", running, torch.int32), ("max_lengths", max_lengths, torch.int32),
    ):  # fmt: skip
        check_tensor(owner, name, tensor, dtype, (num_reqs,), device)
    check_tensor(owner, "threshold", threshold, torch.float32, (1,), device)
    check_tensor(owner, "any_running", any_running, FLAG, (1,), device)
    check_tensor(owner, "stop_token_ids", stop_token_ids, torch.int64, (num_reqs, stop_token_ids.shape[-1]), device)
    check_tensor(owner, "draft_tokens", draft_tokens, torch.int64, (num_reqs, draft_tokens.shape[-1]), device)
    check_step(owner, step, draft_tokens.shape[1])
    return num_reqs, stop_token_ids.shape[1]
