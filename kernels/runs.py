# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Which free runs are taken, and what is in front of them, in a few launches: ``decision.cost_aware.device_runs``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_specdecpp.decision.cost_aware.device_runs import RowsBefore, TakenRows
from vllm_specdecpp.decision.tail_params import CostAwareParams

from .checks import check_launch
from .cost_aware_device import seconds, sigmoid
from .stop_tokens import ends_draft

BLOCKS = {"BLOCK_REQS": 32, "BLOCK_STOP": 4}
BLOCK_RANK = 1024
"""Chances of the whole batch that are looked at together."""
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def steps_of(max_length: int) -> dict[str, int]:
    """Block size for K candidates."""
    return {"BLOCK_STEPS": max(16, triton.next_power_of_2(max_length))}


@triton.jit(do_not_specialize=["tokens_stride", "max_len", "stop_stride", "num_stop", "max_length"])
def _run_chances_kernel(
    tokens_ptr,  # [max_num_reqs, max_len] int32
    states_ptr,  # [num_reqs] int32 or int64
    last_ptr,  # [num_reqs] int64
    starts_ptr,  # [num_reqs] int64
    matches_ptr,  # [num_reqs] int32
    limits_ptr,  # [num_reqs] int32
    stop_token_ids_ptr,  # [num_reqs, num_stop] int64
    run_odds_ptr,  # [1 + num_positions] float32
    run_shifts_ptr,  # [num_reqs] float32
    survival_ptr,  # [num_reqs] float32, read BEHIND drafts
    run_ptr,  # [num_reqs, K] int32, out: its tokens
    chances_ptr,  # [num_reqs, K] float32, out: if all before are accepted
    reach_ptr,  # [num_reqs, K] float32, out
    tokens_stride,
    max_len,
    stop_stride,
    num_stop,
    max_length,
    BEHIND: tl.constexpr,
    BLOCK_STEPS: tl.constexpr,
    BLOCK_STOP: tl.constexpr,
):
    """A program a request: its run, and the chance of each candidate."""
    req = tl.program_id(0)
    steps = tl.arange(0, BLOCK_STEPS)
    inside = steps < max_length
    start, match = tl.load(starts_ptr + req).to(tl.int32), tl.load(matches_ptr + req)
    # A run that comes to the last token goes on as a loop.
    period = tl.maximum(tl.load(last_ptr + req).to(tl.int32) + 1 - start, 1)
    at = tl.minimum(start + steps % period, max_len - 1)
    row = tokens_ptr + tl.load(states_ptr + req).to(tl.int64) * tokens_stride
    run = tl.load(row + at, mask=inside, other=0)
    ends = ends_draft(run.to(tl.int64), steps * 0 + req, inside, stop_token_ids_ptr, stop_stride, num_stop, BLOCK_STOP)
    room = tl.min(tl.where(ends > 0, steps + 1, BLOCK_STEPS), axis=0)
    there = inside & (steps < tl.minimum(tl.load(limits_ptr + req), room)) & (match > 0)
    x = tl.log(tl.maximum(match + steps, 1).to(tl.float32))
    odds = tl.load(run_odds_ptr) * x + tl.load(run_odds_ptr + 2 + steps, mask=inside, other=0.0)
    odds += tl.load(run_shifts_ptr + req)
    chances = tl.where(there, sigmoid(tl.minimum(tl.maximum(odds, -30.0), 30.0)), 0.0)
    reach = tl.cumprod(chances, axis=0)
    if BEHIND:
        reach *= tl.load(survival_ptr + req)
    out = req.to(tl.int64) * max_length + steps
    tl.store(run_ptr + out, run, mask=inside)
    tl.store(chances_ptr + out, chances, mask=inside)
    tl.store(reach_ptr + out, reach, mask=inside)


@triton.jit(do_not_specialize=["num_reqs", "max_length", "verify_size"])
def _take_runs_kernel(
    chance_ptr,  # [num_reqs * K] float32, reach from the best on
    order_ptr,  # [num_reqs * K] int64, where each of them stood
    run_ptr,  # [num_reqs, K]: as _run_chances_kernel left them
    chances_ptr,
    reach_ptr,
    drafts_ptr,  # [num_reqs] int32
    drafted_ptr,  # [num_reqs] int32
    verify_seconds_ptr,
    rows_ptr,  # RowsBefore, read BEHIND drafts
    tokens_ptr,
    spent_ptr,
    candidates_ptr,  # [num_reqs, K] int64, in and out
    accept_ptr,  # [num_reqs, K] float32, in and out
    lengths_ptr,  # [num_reqs] int32, out
    accepted_ptr,  # [num_reqs] float32, out
    num_reqs,
    max_length,
    verify_size,
    BEHIND: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_REQS: tl.constexpr,
    BLOCK_STEPS: tl.constexpr,
):
    """One program: how many rows of the whole batch pay, then each request's share of them."""
    first, emitted, spent = num_reqs, num_reqs.to(tl.float64), 0.0
    if BEHIND:
        first, emitted, spent = tl.load(rows_ptr), tl.load(tokens_ptr), tl.load(spent_ptr)
    num = num_reqs * max_length
    best = 0
    best_speed = emitted / (spent + seconds(verify_seconds_ptr, verify_size, first)).to(tl.float64)
    for start in range(0, num, BLOCK_RANK):
        places = start + tl.arange(0, BLOCK_RANK)
        chance = tl.load(chance_ptr + places, mask=places < num, other=0.0)
        sums = emitted + tl.cumsum(chance.to(tl.float64), axis=0)
        taking = spent + seconds(verify_seconds_ptr, verify_size, first + places + 1)
        speeds = tl.where(chance > 0, sums / taking.to(tl.float64), float("-inf"))
        top = tl.max(speeds, axis=0)
        count = tl.min(tl.where(speeds == top, places + 1, num), axis=0)  # of equals the fewest
        best = tl.where(top > best_speed, count, best)
        best_speed = tl.maximum(top, best_speed)
        emitted += tl.sum(chance.to(tl.float64), axis=0)
    # The best rows are those before the last of them in the order.
    least = tl.load(chance_ptr + tl.maximum(best - 1, 0))
    end = tl.load(order_ptr + tl.maximum(best - 1, 0))
    steps = tl.arange(0, BLOCK_STEPS)[None, :]
    for start in range(0, num_reqs, BLOCK_REQS):
        reqs = start + tl.arange(0, BLOCK_REQS)
        here = reqs < num_reqs
        inside = here[:, None] & (steps < max_length)
        own = reqs.to(tl.int64)[:, None] * max_length
        reach = tl.load(reach_ptr + own + steps, mask=inside, other=0.0)
        taken = inside & (best > 0) & ((reach > least) | ((reach == least) & (own + steps <= end)))
        length = tl.sum(taken.to(tl.int32), axis=1)
        tl.store(lengths_ptr + reqs, length, mask=here)
        tl.store(accepted_ptr + reqs, tl.sum(tl.where(taken, reach, 0.0), axis=1), mask=here)
        puts = (tl.load(drafts_ptr + reqs, mask=here, other=0) > 0) == BEHIND
        place = steps - tl.load(drafted_ptr + reqs, mask=here, other=0)[:, None]  # in the run
        there = inside & puts[:, None] & (place >= 0) & (place < length[:, None])
        token = tl.load(run_ptr + own + place, mask=there, other=-1)
        chances = tl.load(chances_ptr + own + place, mask=there, other=0.0)
        if BEHIND:
            tl.store(candidates_ptr + own + steps, token.to(tl.int64), mask=there)
        else:
            tl.store(candidates_ptr + own + steps, token.to(tl.int64), mask=inside)
        tl.store(accept_ptr + own + steps, chances, mask=there)


def take_runs(
    tokens: Tensor, states: Tensor, last: Tensor, starts: Tensor, matches: Tensor, limits: Tensor,
    stop_token_ids: Tensor, drafts: Tensor, lengths: Tensor, params: CostAwareParams, before: RowsBefore | None,
    *, candidates: Tensor, accept: Tensor,
) -> TakenRows:  # fmt: skip
    """``device_runs.take_runs`` in two launches and a sort, with the same arguments; never waits. They are not
    checked: they are the engine's own, and this is called twice a round.

    Raises:
        ValueError: one line: tensors that are not on a GPU.
    """
    num_reqs, max_length = candidates.shape
    check_launch("take_runs", _take_runs_kernel, tokens.device, "decision.cost_aware.device_runs.take_runs")
    run = torch.empty_like(accept, dtype=torch.int32)
    chances, reach = torch.empty_like(accept), torch.empty_like(accept)
    taken = TakenRows(torch.empty_like(limits), torch.empty_like(limits, dtype=torch.float32))
    behind = before or RowsBefore(params.base, params.price, params.price, params.price)  # which nobody reads
    flags = {"BEHIND": before is not None, **steps_of(max_length)}
    _run_chances_kernel[(num_reqs,)](
        tokens, states, last, starts, matches, limits, stop_token_ids, params.run_odds, params.run_shifts,
        behind.survival, run, chances, reach, tokens.stride(0), tokens.shape[1], stop_token_ids.stride(0),
        stop_token_ids.shape[1], max_length, BLOCK_STOP=BLOCKS["BLOCK_STOP"], **flags, **OPTIONS,
    )  # fmt: skip
    chance, order = reach.view(-1).sort(descending=True, stable=True)
    _take_runs_kernel[(1,)](
        chance, order, run, chances, reach, drafts, lengths, params.verify_seconds, behind.rows, behind.tokens,
        behind.seconds, candidates, accept, *taken, num_reqs, max_length, params.verify_seconds.numel(),
        BLOCK_RANK=BLOCK_RANK, BLOCK_REQS=BLOCKS["BLOCK_REQS"], **flags, **OPTIONS,
    )  # fmt: skip
    return taken


@triton.jit(
    do_not_specialize=[
        "tokens_stride", "draft_stride", "stop_stride", "num_stop", "scores_stride", "max_len", "num_reqs",
        "max_length", "lag",
    ]
)  # fmt: skip
def _behind_drafts_kernel(
    tokens_ptr,  # [max_num_reqs, max_len] int32, in and out
    states_ptr,  # [num_reqs] int32 or int64
    last_ptr,  # [num_reqs] int64
    max_lengths_ptr,  # [num_reqs] int32
    lengths_ptr,  # [num_reqs] int32
    draft_tokens_ptr,  # [num_reqs, K] int64
    stop_token_ids_ptr,  # [num_reqs, num_stop] int64
    accepted_ptr,  # [num_reqs] float32
    drafts_ptr,  # [num_reqs] int32
    expected_ptr,  # [num_reqs] float32
    scores_log_ptr,  # [K, num_reqs] float32
    widths_ptr,  # [K] int32
    base_ptr,  # from here on: CostAwareParams
    slopes_ptr,
    this_ptr,
    means_ptr,
    step_seconds_ptr,
    first_seconds_ptr,
    ends_ptr,  # [num_reqs] int64, out
    limits_ptr,  # [num_reqs] int32, out
    rows_ptr,  # RowsBefore, out
    emitted_ptr,
    spent_ptr,
    survival_ptr,
    tokens_stride,
    draft_stride,
    stop_stride,
    num_stop,
    scores_stride,
    max_len,
    num_reqs,
    max_length,
    lag,
    BLOCK_REQS: tl.constexpr,
    BLOCK_STEPS: tl.constexpr,
    BLOCK_STOP: tl.constexpr,
):
    """One program: sums over the whole batch."""
    steps = tl.arange(0, BLOCK_STEPS)
    inside = steps < max_length
    widths = tl.load(widths_ptr + steps, mask=inside, other=0)
    passes = tl.where(steps == 0, tl.load(first_seconds_ptr + widths), tl.load(step_seconds_ptr + widths))
    spent = tl.sum(passes, axis=0)  # none of 0 requests
    looked = tl.load(widths_ptr + steps + lag, mask=steps + lag < max_length, other=0) > 0
    this = tl.load(this_ptr + 1 + steps, mask=inside, other=0.0)
    means = tl.load(means_ptr + 1 + steps, mask=inside, other=1.0)
    rows, emitted = tl.load(base_ptr), num_reqs.to(tl.float64)
    for start in range(0, num_reqs, BLOCK_REQS):
        reqs = start + tl.arange(0, BLOCK_REQS)
        here = reqs < num_reqs
        last = tl.load(last_ptr + reqs, mask=here, other=0)
        length = tl.load(lengths_ptr + reqs, mask=here, other=0)
        drafts = tl.load(drafts_ptr + reqs, mask=here, other=0) > 0
        own = tl.load(accepted_ptr + reqs, mask=here, other=0.0)
        own = tl.load(expected_ptr + reqs, mask=here, other=0.0) + tl.where(drafts, 0.0, own)
        rows += tl.sum(length, axis=0)
        emitted += tl.sum(own.to(tl.float64), axis=0)

        # vLLM reads no further than a request's last token, and writes before it does.
        drafted = here[:, None] & inside[None, :] & (steps[None, :] < length[:, None])
        draft = draft_tokens_ptr + reqs.to(tl.int64)[:, None] * draft_stride
        state = tl.load(states_ptr + reqs, mask=here, other=0).to(tl.int64)[:, None] * tokens_stride
        at = last[:, None] + 1 + steps[None, :]
        ids = tl.load(draft + steps[None, :], mask=drafted, other=-1)
        tl.store(tokens_ptr + state + at, ids.to(tl.int32), mask=drafted & (at < max_len))

        end = tl.max(tl.where(steps[None, :] == length[:, None] - 1, ids, -1), axis=1)
        ended = ends_draft(end, reqs, here, stop_token_ids_ptr, stop_stride, num_stop, BLOCK_STOP)
        room = tl.load(max_lengths_ptr + reqs, mask=here, other=0) - length
        tl.store(limits_ptr + reqs, tl.where(drafts & ((ended == 0) | (end < 0)), room, 0), mask=here)
        tl.store(ends_ptr + reqs, last + length, mask=here)

        scores = scores_log_ptr + (steps + lag).to(tl.int64)[None, :] * scores_stride + reqs[:, None]
        log_odds = tl.load(scores, mask=drafted & looked[None, :], other=float("nan"))
        accept = sigmoid(tl.load(slopes_ptr) * log_odds + this[None, :])
        accept = tl.where(log_odds == log_odds, accept, means[None, :])
        product = tl.cumprod(tl.where(drafted, accept, 1.0), axis=1)
        survival = tl.sum(tl.where(steps[None, :] == BLOCK_STEPS - 1, product, 0.0), axis=1)
        tl.store(survival_ptr + reqs, survival, mask=here)
    tl.store(rows_ptr, rows)
    tl.store(emitted_ptr, emitted)
    tl.store(spent_ptr, spent)


def behind_drafts(
    tokens: Tensor, states: Tensor, last: Tensor, max_lengths: Tensor, lengths: Tensor, draft_tokens: Tensor,
    stop_token_ids: Tensor, accepted: Tensor, *, drafts: Tensor, expected: Tensor, scores_log: Tensor, widths: Tensor,
    params: CostAwareParams, lag: int,
) -> tuple[Tensor, Tensor, RowsBefore]:  # fmt: skip
    """``device_runs.behind_drafts`` in one launch, with the same arguments; never waits. They are not checked.

    Raises:
        ValueError: as :func:`take_runs`.
    """
    num_reqs, max_length = draft_tokens.shape
    check_launch("behind_drafts", _behind_drafts_kernel, tokens.device, "decision.cost_aware.device_runs.behind_drafts")
    ends, limits = torch.empty_like(last), torch.empty_like(lengths)
    before = RowsBefore(
        torch.empty_like(params.base), torch.empty_like(params.price, dtype=torch.float64),
        torch.empty_like(params.price), torch.empty_like(expected),
    )  # fmt: skip
    _behind_drafts_kernel[(1,)](
        tokens, states, last, max_lengths, lengths, draft_tokens, stop_token_ids, accepted, drafts, expected,
        scores_log, widths, params.base, params.slopes, params.this, params.means, params.step_seconds,
        params.first_seconds, ends, limits, *before, tokens.stride(0), draft_tokens.stride(0),
        stop_token_ids.stride(0), stop_token_ids.shape[1], scores_log.stride(0), tokens.shape[1], num_reqs, max_length,
        lag, **BLOCKS, **steps_of(max_length), **OPTIONS,
    )  # fmt: skip
    return ends, limits, before
