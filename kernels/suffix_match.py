# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""The longest suffix match of each request, in one launch: ``decision.sources.suffix.longest_match``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_specdecpp.decision.sources.suffix import LATEST, MAX_MATCH, NARROW, PLACES

from .checks import check_launch, check_tensor

INDEX = (torch.int32, torch.int64)
SIZES = {"MAX_MATCH": MAX_MATCH, "LATEST": LATEST, "PLACES": PLACES, "NARROW": NARROW, "BLOCK": 1024}
OPTIONS = {"num_warps": 4}


@triton.jit(do_not_specialize=["tokens_stride"])
def _suffix_match_kernel(
    tokens_ptr,  # [max_num_reqs, max_len] int32
    states_ptr,  # [num_reqs] int32 or int64
    last_ptr,  # [num_reqs] int64
    limits_ptr,  # [num_reqs] int32
    starts_ptr,  # [num_reqs] int64, out
    matches_ptr,  # [num_reqs] int32, out
    tokens_stride,
    MAX_MATCH: tl.constexpr,
    LATEST: tl.constexpr,
    PLACES: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program a request, from its latest tokens back: a full match ends the search, as no earlier one is better."""
    req = tl.program_id(0)
    asked = tl.load(limits_ptr + req) > 0
    last = tl.where(asked, tl.load(last_ptr + req), 0).to(tl.int32)
    row = tokens_ptr + tl.load(states_ptr + req).to(tl.int64) * tokens_stride
    token = tl.load(row + last, mask=asked, other=0)  # rows that ask nothing may be nobody's
    best, place, num_places, num_sure = 0, -1, 0, 0
    start = (last + BLOCK - 1) // BLOCK * BLOCK
    while (start > 0) & (best < MAX_MATCH) & (num_places < LATEST) & (num_sure < PLACES):
        start -= BLOCK
        where = start + tl.arange(0, BLOCK)
        inside = where < last
        same = inside & (tl.load(row + where, mask=inside, other=0) == token)
        ones = same.to(tl.int32)
        total = tl.sum(ones, axis=0)
        same &= num_places + total - tl.cumsum(ones, axis=0) + ones <= LATEST  # counted from the latest
        num_places += total
        lengths = same.to(tl.int32)
        back = 1
        while (back < MAX_MATCH) & (tl.max(same.to(tl.int32), axis=0) > 0):
            same &= where >= back
            same &= tl.load(row + where - back, mask=same, other=0) == tl.load(row + last - back)
            lengths += same.to(tl.int32)
            back += 1
        ones = (lengths >= NARROW).to(tl.int32)
        total = tl.sum(ones, axis=0)
        late = num_sure + total - tl.cumsum(ones, axis=0) + ones <= PLACES
        lengths = tl.where((ones > 0) & (late == 0), 0, lengths)
        num_sure += total
        longest = tl.max(lengths, axis=0)
        latest = tl.max(tl.where(lengths == longest, where, -1), axis=0)
        place = tl.where(longest > best, latest, place)  # of equals the one found first, which is later
        best = tl.maximum(longest, best)
    tl.store(starts_ptr + req, place + 1)
    tl.store(matches_ptr + req, best)


def suffix_match(
    tokens: Tensor, states: Tensor, last: Tensor, limits: Tensor, *, starts: Tensor, matches: Tensor
) -> None:
    """Where each request's last tokens stood before. One launch; never waits.

    Args:
        tokens: [max_num_reqs, max_len] int32 of any row stride, by request state.
        states: [num_reqs] int32 or int64, the requests' states.
        last: [num_reqs] int64, where in its row a request's last token stands; what is behind it is not read.
        limits: [num_reqs] int32, candidates at most; 0: nothing is looked for, and nothing found.
        starts: [num_reqs] int64, out: where the match goes on; 0 if there is none.
        matches: [num_reqs] int32, out: tokens that match; 0 if there is none.

    Raises:
        ValueError: one line: a tensor of another shape, dtype, device or stride.
    """
    _check("suffix_match", tokens, states, last, limits, starts, matches)
    check_launch("suffix_match", _suffix_match_kernel, tokens.device, "suffix_match_torch")
    if len(states):
        _suffix_match_kernel[(len(states),)](
            tokens, states, last, limits, starts, matches, tokens.stride(0), **SIZES, **OPTIONS
        )


def suffix_match_torch(
    tokens: Tensor, states: Tensor, last: Tensor, limits: Tensor, *, starts: Tensor, matches: Tensor
) -> None:
    """The twin of :func:`suffix_match`, in torch, for any device."""
    _check("suffix_match_torch", tokens, states, last, limits, starts, matches)
    rows = tokens[states.long()]  # [num_reqs, max_len]
    last = torch.where(limits > 0, last, 0)[:, None]  # [num_reqs, 1]
    where = torch.arange(rows.shape[1], device=rows.device)
    same = (where < last) & (rows == rows.gather(1, last))
    same &= _from_the_end(same) <= LATEST
    lengths = same.int()
    for back in range(1, min(MAX_MATCH, rows.shape[1])):
        same = same & (where >= back)
        same[:, back:] &= rows[:, :-back] == rows.gather(1, (last - back).clamp(min=0))
        lengths += same
    sure = lengths >= NARROW
    lengths[sure & (_from_the_end(sure) > PLACES)] = 0
    matches.copy_(lengths.amax(dim=1))
    places = torch.where((lengths == matches[:, None]) & (lengths > 0), where, -1)
    starts.copy_(places.amax(dim=1) + 1)


def _from_the_end(mask: Tensor) -> Tensor:
    """[num_reqs, max_len] how many are set from here on."""
    counts: Tensor = mask.flip(1).cumsum(1).flip(1)
    return counts


def _check(
    owner: str, tokens: Tensor, states: Tensor, last: Tensor, limits: Tensor, starts: Tensor, matches: Tensor
) -> None:  # fmt: skip
    device, num_reqs = tokens.device, len(states)
    check_tensor(owner, "tokens", tokens, torch.int32, (len(tokens), tokens.shape[-1]), device)
    for name, tensor, dtypes in (
        ("states", states, INDEX), ("last", last, torch.int64), ("limits", limits, torch.int32),
        ("starts", starts, torch.int64), ("matches", matches, torch.int32),
    ):  # fmt: skip
        check_tensor(owner, name, tensor, dtypes, (num_reqs,), device)
