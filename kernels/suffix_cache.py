# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""The longest suffix match of each request in what others have emitted: ``longest_match`` in a ``SuffixCache``."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_specdecpp.decision.sources.suffix import LATEST, MAX_MATCH

from .checks import check_launch

MOST = 4 * LATEST
"""Latest tokens of each other request that are looked at."""
STATE, PLACE = 16, 28
"""Bits of a state and of a place in its text; how many tokens match stands before both."""
SIZES = {"MAX_MATCH": MAX_MATCH, "MOST": MOST, "BLOCK": 1024, "STATE": STATE, "PLACE": PLACE}
OPTIONS = {"num_warps": 4}


class Where(NamedTuple):
    """Where each request's run stands."""

    states: Tensor
    """[num_reqs] int64, whose text it is in."""
    last: Tensor
    """[num_reqs] int64, where that ends."""
    limits: Tensor
    """[num_reqs] int32, candidates at most."""


@triton.jit(do_not_specialize=["tokens_stride"])
def _match_others_kernel(
    tokens_ptr,  # [max_num_reqs, max_len] int32
    states_ptr,  # [num_reqs] int32 or int64
    last_ptr,  # [num_reqs] int64
    limits_ptr,  # [num_reqs] int32
    prompt_lens_ptr,  # [max_num_reqs] int32
    total_lens_ptr,  # [max_num_reqs] int32
    matches_ptr,  # [num_reqs] int32
    found_ptr,  # [num_reqs] int64, in and out: the best so far
    tokens_stride,
    MAX_MATCH: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK: tl.constexpr,
    STATE: tl.constexpr,
    PLACE: tl.constexpr,
):
    """A program a request and a state, of which the output is looked at."""
    req, other = tl.program_id(0), tl.program_id(1)
    state = tl.load(states_ptr + req).to(tl.int64)
    end = tl.load(total_lens_ptr + other) - 1  # a match that nothing follows is none
    first = tl.load(prompt_lens_ptr + other)
    least = tl.maximum(first, end - MOST)
    asked = (tl.load(limits_ptr + req) > 0) & (state != other) & (end > least)
    asked &= tl.load(matches_ptr + req) < MAX_MATCH  # no match is longer
    own = tokens_ptr + state * tokens_stride
    text = tokens_ptr + other.to(tl.int64) * tokens_stride
    last = tl.where(asked, tl.load(last_ptr + req), 0).to(tl.int32)
    token = tl.load(own + last, mask=asked, other=-1)
    best, place = 0, 0
    start = tl.where(asked, (end - least + BLOCK - 1) // BLOCK * BLOCK, 0)
    while (start > 0) & (best < MAX_MATCH):
        start -= BLOCK
        where = least + start + tl.arange(0, BLOCK)
        same = where < end
        same &= tl.load(text + where, mask=same, other=-1) == token
        lengths = same.to(tl.int32)
        back = 1
        while (back < MAX_MATCH) & (back <= last) & (tl.max(same.to(tl.int32), axis=0) > 0):
            same &= where >= first + back
            same &= tl.load(text + where - back, mask=same, other=-1) == tl.load(own + last - back)
            lengths += same.to(tl.int32)
            back += 1
        longest = tl.max(lengths, axis=0)
        latest = tl.max(tl.where(lengths == longest, where, 0), axis=0)
        place = tl.where(longest > best, latest + 1, place)
        best = tl.maximum(longest, best)
    if best > 0:
        tl.atomic_max(found_ptr + req, (((tl.cast(best, tl.int64) << STATE) | other) << PLACE) | place)


def match_others(
    tokens: Tensor, states: Tensor, last: Tensor, limits: Tensor, prompt_lens: Tensor, total_lens: Tensor,
    *, starts: Tensor, matches: Tensor,
) -> Where:  # fmt: skip
    """Prefer what others have emitted where more tokens match there; one launch, then a few tensors. Never waits.

    Args:
        tokens, states, last, limits, starts, matches: as :func:`.suffix_match` left them; the last two are in and out.
        prompt_lens, total_lens: [max_num_reqs] int32 by request state; of a request that has ended they stay until its
            state is another's.

    Raises:
        ValueError: one line: tensors that are not on a GPU.
    """
    check_launch("match_others", _match_others_kernel, tokens.device, "match_others_torch")
    found = torch.zeros_like(starts)
    _match_others_kernel[(len(states), len(tokens))](
        tokens, states, last, limits, prompt_lens, total_lens, matches, found, tokens.stride(0), **SIZES, **OPTIONS
    )
    return _prefer(found, states, last, limits, total_lens, starts, matches)


def match_others_torch(
    tokens: Tensor, states: Tensor, last: Tensor, limits: Tensor, prompt_lens: Tensor, total_lens: Tensor,
    *, starts: Tensor, matches: Tensor,
) -> Where:  # fmt: skip
    """The twin of :func:`match_others`, in torch, for any device."""
    (num_states, max_len), device = tokens.shape, tokens.device
    where, others = torch.arange(max_len, device=device), torch.arange(num_states, device=device)
    ends, firsts = (total_lens - 1)[:, None], prompt_lens[:, None]  # [max_num_reqs, 1]
    inside = (where >= torch.maximum(firsts, ends - MOST)) & (where < ends)  # [max_num_reqs, max_len]
    found = torch.zeros_like(starts)
    for req, (state, place, limit) in enumerate(zip(states.tolist(), last.tolist(), limits.tolist(), strict=True)):
        same = inside & (tokens == tokens[state, place]) & (others != state)[:, None]
        lengths = same.int()
        for back in range(1, min(MAX_MATCH, place + 1) if limit > 0 else 0):
            same = same & (where >= firsts + back)
            same[:, back:] &= tokens[:, :-back] == tokens[state, place - back]
            lengths += same
        packed = (((lengths.long() << STATE) | others[:, None]) << PLACE) | (where + 1)
        found[req] = torch.where((lengths > 0) & (limit > 0), packed, 0).max()
    return _prefer(found, states, last, limits, total_lens, starts, matches)


def _prefer(
    found: Tensor, states: Tensor, last: Tensor, limits: Tensor, total_lens: Tensor, starts: Tensor, matches: Tensor
) -> Where:  # fmt: skip
    """Put in what was ``found`` [num_reqs] where it matches more than a request's own text."""
    length, others = (found >> (STATE + PLACE)).int(), (found >> PLACE) & ((1 << STATE) - 1)
    place, better = found & ((1 << PLACE) - 1), length > matches
    ends = total_lens[others].long()
    starts.copy_(torch.where(better, place, starts))
    matches.copy_(torch.where(better, length, matches))
    # Another's text is no loop: a run ends where it does.
    return Where(
        torch.where(better, others, states.long()),
        torch.where(better, ends - 1, last),
        torch.where(better, torch.minimum(limits, (ends - place).int()), limits),
    )
