# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""What a stop rule reads of the draft's logits, from one pass over them: ``decision.features.features_from_logits``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_launch, check_tensor

BLOCK_VOCAB = 4096
"""Entries of a row that one program reads: enough programs for all of a GPU's processors even at batch 1."""
NUM_PARTIALS = 5
"""Numbers kept of each part of a row."""
LOGITS = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS = {"num_warps": 8}
COMBINE_OPTIONS = {"num_warps": 1}


def num_parts(vocab_size: int) -> int:
    """Programs that share a row."""
    return triton.cdiv(vocab_size, BLOCK_VOCAB)


@triton.jit(do_not_specialize=["vocab_size", "num_parts"])
def _part_kernel(
    logits_ptr,  # [num_reqs, vocab_size]
    partials_ptr,  # [num_reqs, num_parts, 5] float32, out: largest, second, its index, sum e^y, sum y e^y
    row_stride,
    vocab_size,
    num_parts,
    BLOCK_VOCAB: tl.constexpr,
):
    """Of one part of a row: with y = x - max x, the sums z = sum e^y and t = sum y e^y, and the two largest."""
    req, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = part * BLOCK_VOCAB + tl.arange(0, BLOCK_VOCAB)
    x = tl.load(logits_ptr + req * row_stride + columns, mask=columns < vocab_size, other=float("-inf")).to(tl.float32)
    largest = tl.max(x, axis=0)
    # Of equals the first; none equals it where all are NaN.
    index = tl.minimum(tl.min(tl.where(x == largest, columns, vocab_size), axis=0), vocab_size - 1)
    second = tl.max(tl.where(columns == index, float("-inf"), x), axis=0)
    y = x - largest
    # An entry of -inf has probability 0, also where the whole part is -inf.
    e = tl.where(x == float("-inf"), 0.0, tl.exp(y))
    out = partials_ptr + (req * num_parts + part) * 5
    tl.store(out, largest)
    tl.store(out + 1, second)
    tl.store(out + 2, index.to(tl.float32, bitcast=True))
    tl.store(out + 3, tl.sum(e, axis=0))
    tl.store(out + 4, tl.sum(tl.where(x == float("-inf"), 0.0, y * e), axis=0))


@triton.jit(do_not_specialize=["num_parts"])
def _combine_kernel(
    partials_ptr,  # [num_reqs, num_parts, 5] float32
    top1_prob_ptr,  # [num_reqs] float32, out
    entropy_ptr,  # [num_reqs] float32, out
    margin_ptr,  # [num_reqs] float32, out
    argmax_ptr,  # [num_reqs] int64, out
    num_parts,
    BLOCK_PARTS: tl.constexpr,
):
    """Parts brought to the row's maximum M: z = sum z_i e^{M_i - M}; top-1 = 1 / z, entropy = log z - t / z.

    No term of t is above 0, so the entropy is a sum of what is not below 0: nothing cancels.
    """
    req, parts = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_PARTS)
    there = parts < num_parts
    row = partials_ptr + (req * num_parts + parts) * 5
    larges = tl.load(row, mask=there, other=float("-inf"))
    seconds = tl.load(row + 1, mask=there, other=float("-inf"))
    indices = tl.load(row + 2, mask=there, other=0.0).to(tl.int32, bitcast=True)
    sums = tl.load(row + 3, mask=there, other=0.0)
    weighted = tl.load(row + 4, mask=there, other=0.0)

    largest = tl.max(larges, axis=0)
    winner = tl.min(tl.where(larges == largest, parts, num_parts - 1), axis=0)
    second = tl.max(tl.where(parts == winner, seconds, larges), axis=0)
    shift = larges - largest
    scale = tl.exp(shift)
    # A part of nothing but -inf adds nothing; a row of them stays without a sum, a NaN as in the twin.
    empty = (sums == 0) & (largest > float("-inf"))
    z = tl.sum(tl.where(empty, 0.0, sums * scale), axis=0)
    t = tl.sum(tl.where(empty, 0.0, (weighted + shift * sums) * scale), axis=0)
    tl.store(top1_prob_ptr + req, 1.0 / z)
    tl.store(entropy_ptr + req, tl.log(z) - t / z)
    tl.store(margin_ptr + req, tl.where(z == z, largest - second, float("nan")))
    tl.store(argmax_ptr + req, tl.sum(tl.where(parts == winner, indices, 0), axis=0).to(tl.int64))


def make_partials(num_reqs: int, vocab_size: int, device: torch.device | str) -> Tensor:
    """Scratch for :func:`logits_summary`, for up to ``num_reqs`` requests: [num_reqs, num_parts, 5] float32."""
    return torch.empty(num_reqs, num_parts(vocab_size), NUM_PARTIALS, device=device)


def logits_summary(
    logits: Tensor, *, top1_prob: Tensor, entropy: Tensor, margin: Tensor, argmax: Tensor, partials: Tensor
) -> None:
    """Summarise the draft's logits before temperature, in float32. Two launches; never waits.

    Args:
        logits: [num_reqs, vocab_size] float32, bfloat16 or float16 of any row stride; -inf has probability 0.
        top1_prob: [num_reqs] float32, out: the largest probability.
        entropy: [num_reqs] float32, out: in nats.
        margin: [num_reqs] float32, out: the largest logit minus the second; inf if there is no other.
        argmax: [num_reqs] int64, out: the first of the largest. A NaN in a row makes the other three NaN, and leaves
            this one an index of the row.
        partials: scratch of :func:`make_partials` for as many requests or more.

    Raises:
        ValueError: one line: a tensor of another shape, dtype, device or stride.
    """
    _check("logits_summary", logits, top1_prob, entropy, margin, argmax, partials)
    check_launch("logits_summary", _part_kernel, logits.device, "logits_summary_torch")
    num_reqs, vocab_size = logits.shape
    if num_reqs == 0:
        return
    parts = num_parts(vocab_size)
    _part_kernel[(num_reqs, parts)](
        logits, partials, logits.stride(0), vocab_size, parts, BLOCK_VOCAB=BLOCK_VOCAB, **OPTIONS
    )
    _combine_kernel[(num_reqs,)](
        partials, top1_prob, entropy, margin, argmax, parts, BLOCK_PARTS=triton.next_power_of_2(parts),
        **COMBINE_OPTIONS,
    )  # fmt: skip


def logits_summary_torch(
    logits: Tensor, *, top1_prob: Tensor, entropy: Tensor, margin: Tensor, argmax: Tensor, partials: Tensor
) -> None:
    """The twin of :func:`logits_summary`, in torch, for any device; ``partials`` stay as they are."""
    _check("logits_summary_torch", logits, top1_prob, entropy, margin, argmax, partials)
    if logits.shape[0] == 0:
        return
    x = logits.float()  # [num_reqs, vocab_size]
    argmax.copy_(x.argmax(dim=-1))
    best = x.topk(min(2, x.shape[1]), dim=-1).values
    margin.copy_(best[:, 0] - best[:, 1] if x.shape[1] > 1 else torch.full_like(best[:, 0], torch.inf))
    y = x - x.amax(dim=-1, keepdim=True)
    log_z = y.logsumexp(dim=-1)  # [num_reqs]
    top1_prob.copy_(torch.exp(-log_z))
    entropy.copy_(torch.special.entr((y - log_z[:, None]).exp()).sum(dim=-1))
    margin.copy_(torch.where(log_z.isnan(), torch.nan, margin))


def _check(
    owner: str, logits: Tensor, top1_prob: Tensor, entropy: Tensor, margin: Tensor, argmax: Tensor, partials: Tensor
) -> None:  # fmt: skip
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(
            f"specdecpp: {owner}: logits have shape {list(logits.shape)}, must be [num_reqs, vocab_size]; reshape them"
        )
    num_reqs, vocab_size = logits.shape
    check_tensor(owner, "logits", logits, LOGITS, logits.shape, logits.device)
    for name, tensor in (("top1_prob", top1_prob), ("entropy", entropy), ("margin", margin)):
        check_tensor(owner, name, tensor, torch.float32, (num_reqs,), logits.device)
    check_tensor(owner, "argmax", argmax, torch.int64, (num_reqs,), logits.device)
    parts = num_parts(vocab_size)
    room = partials.shape[0] if partials.dim() == 3 else 0
    check_tensor(owner, "partials", partials, torch.float32, (max(room, num_reqs), parts, NUM_PARTIALS), logits.device)
    if not partials.is_contiguous():
        raise ValueError(f"specdecpp: {owner}: partials are not contiguous; use those of make_partials")
