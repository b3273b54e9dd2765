# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Device functions of the cost-aware tail: acceptance ahead, cost tables, and ranking a batch within one program."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_specdecpp.decision import tails

MAX_LOG_ODDS = tl.constexpr(tails.MAX_LOG_ODDS)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def seconds(table_ptr, size, index):
    """Entries of a cost table at ``index`` >= 0; beyond its end the last slope goes on."""
    end = size - 1
    slope = tl.load(table_ptr + end) - tl.load(table_ptr + end - 1)
    beyond = tl.maximum(index - end, 0).to(tl.float32)
    return tl.load(table_ptr + tl.minimum(index, end)) + beyond * slope


@triton.jit
def standing(values, members, num_reqs, BLOCK_REQS: tl.constexpr, BLOCK_RANK: tl.constexpr):
    """For each request: how many members are as good as it or better, and the sum of their values.

    Of equals the first counts as better; a member counts itself. So the n best are those with a count of n or less, and
    the sum of the one whose count is n is theirs. By comparison with all, BLOCK_RANK at a time: no sort, no scratch.

    Args:
        values: [BLOCK_REQS] float32, none below 0.
        members: [BLOCK_REQS] bool.
        num_reqs: no member stands behind it.

    Returns:
        [BLOCK_REQS] int32 and [BLOCK_REQS] float32.
    """
    reqs = tl.arange(0, BLOCK_REQS)
    groups = tl.arange(0, BLOCK_REQS // BLOCK_RANK)[:, None]
    shape: tl.constexpr = [BLOCK_REQS // BLOCK_RANK, BLOCK_RANK]
    grouped = tl.reshape(tl.where(members, values, -1.0), shape)  # below every member's
    counts = tl.zeros([BLOCK_REQS], tl.int32)
    sums = tl.zeros([BLOCK_REQS], tl.float32)
    for group in range(0, tl.cdiv(num_reqs, BLOCK_RANK)):
        others = tl.sum(tl.where(groups == group, grouped, 0.0), axis=0)[:, None]  # [BLOCK_RANK, 1]
        number = group * BLOCK_RANK + tl.arange(0, BLOCK_RANK)[:, None]
        first = (others == values[None, :]) & (number <= reqs[None, :])
        better = (others > values[None, :]) | first  # [BLOCK_RANK, BLOCK_REQS]
        # Along the first axis: a request's comparisons are one thread's.
        counts += tl.sum(better.to(tl.int32), axis=0)
        sums += tl.sum(tl.where(better, others, 0.0), axis=0)
    return counts, sums


@triton.jit
def following(
    log_odds,  # [BLOCK_REQS] float32 of a candidate's score, or what the score of a later one is expected to be
    scored,  # [BLOCK_REQS] bool; without a score the mean acceptance stands in
    position,  # of that candidate
    levels,  # [BLOCK_REQS] float32, what the request's record adds to its log-odds
    slopes_ptr,
    next_ptr,
    drift_ptr,
    means_ptr,
):
    """Acceptance of the candidate after, and the log-odds expected of its score: [BLOCK_REQS] each."""
    log_odds += levels
    after = tl.load(slopes_ptr + 1) * log_odds + tl.load(next_ptr + position)
    accept = tl.where(scored, sigmoid(after), tl.load(means_ptr + position + 1))
    # The score that would give the same acceptance, were it the candidate's own.
    expected = tl.load(slopes_ptr + 2) * log_odds + tl.load(drift_ptr + position)
    return accept, tl.minimum(tl.maximum(expected, -MAX_LOG_ODDS), MAX_LOG_ODDS)
