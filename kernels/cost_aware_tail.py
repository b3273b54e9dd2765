# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""What follows the draw in every draft step under the cost-aware rule: ``decision.cost_aware.rule.CostAwareRound``."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .checks import check_launch
from .cost_aware_device import MAX_LOG_ODDS, following, seconds, sigmoid, standing
from .cost_aware_params import HORIZON, CostAwareParams
from .cost_aware_twin import check_arguments, cost_aware_tail_torch
from .stop_tokens import ends_draft

__all__ = ["CostAwareParams", "cost_aware_tail", "cost_aware_tail_torch"]

MAX_REQS = 1024
"""Requests in a batch: one program ranks them all."""
_SCALARS = [
    "num_reqs", "num_stop", "stop_stride", "draft_stride", "scores_stride", "step", "step_size", "verify_size",
    "horizon",
]  # fmt: skip


def sizes(num_reqs: int) -> dict[str, int]:
    """Block sizes for a batch: the only thing, besides flags, that a launch is specialised on."""
    block = max(32, triton.next_power_of_2(num_reqs))
    return {"BLOCK_REQS": block, "BLOCK_RANK": 16, "BLOCK_STOP": 4}


def options(num_reqs: int) -> dict[str, int | bool]:
    """Launch options for a batch: a thread a request; no fused multiply-adds, as in the twin."""
    return {"num_warps": min(sizes(num_reqs)["BLOCK_REQS"] // 32, 16), "enable_fp_fusion": False}


@triton.jit(do_not_specialize=_SCALARS)
def _cost_aware_tail_kernel(
    scores_ptr,  # [num_reqs] float32
    token_ids_ptr,  # [num_reqs] int64
    survival_ptr,  # [num_reqs] float32, in and out
    expected_ptr,  # [num_reqs] float32, in and out
    lengths_ptr,  # [num_reqs] int32, in and out
    running_ptr,  # [num_reqs] int32, in and out
    stop_token_ids_ptr,  # [num_reqs, num_stop] int64
    draft_tokens_ptr,  # [num_reqs, K] int64, out: column step - 1
    any_running_ptr,  # [1] int32 or bool, out
    scores_log_ptr,  # [K, num_reqs] float32, out: row step - 1
    widths_ptr,  # [K] int32, out: entry step - 1
    limits_ptr,  # from here on: CostAwareParams
    batch_ptr,
    held_ptr,
    probe_ptr,
    rate_ptr,
    explore_ptr,  # in and out
    slopes_ptr,
    this_ptr,
    next_ptr,
    means_ptr,
    step_seconds_ptr,
    verify_seconds_ptr,
    num_reqs,
    num_stop,
    stop_stride,
    draft_stride,
    scores_stride,
    step,
    step_size,
    verify_size,
    horizon,
    LAG: tl.constexpr,
    DROP_LAST: tl.constexpr,
    BLOCK_REQS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_STOP: tl.constexpr,
):
    """The n best requests draw m more candidates if those bring more tokens than their time is worth:

        sum of S_k a_{k+1} + ... + S_k a_{k+1}...a_{k+m}  >  rho (m step[n] + verify[T + n m] - verify[T])

    for the best n and m <= horizon; a request that stops submits its last look if that pays for its row. One program:
    the whole batch is compared with itself.
    """
    reqs = tl.arange(0, BLOCK_REQS)
    inside = reqs < num_reqs
    running = tl.load(running_ptr + reqs, mask=inside, other=0) != 0
    lengths = tl.load(lengths_ptr + reqs, mask=inside, other=0)
    room = tl.load(limits_ptr + reqs, mask=inside, other=0) - lengths - 1
    rate = tl.load(rate_ptr)
    held = tl.load(held_ptr) != 0
    num_running = tl.sum(running.to(tl.int32), axis=0)
    tl.store(widths_ptr + step - 1, num_running)

    # The score's log-odds. It is of the candidate at `position`: of the one just drawn, or with LAG 1 the one before.
    position = step - LAG
    score = tl.load(scores_ptr + reqs, mask=running & (position > 0), other=float("nan"))
    scored = score == score
    score = tl.minimum(tl.maximum(tl.where(scored, score, 0.5), 0.0), 1.0)
    log_odds = tl.minimum(tl.maximum(tl.log(score / (1.0 - score)), -MAX_LOG_ODDS), MAX_LOG_ODDS)
    log_odds = tl.where(scored, log_odds, 0.0)
    logged = tl.where(scored, log_odds, float("nan"))
    tl.store(scores_log_ptr + (step - 1).to(tl.int64) * scores_stride + reqs, logged, mask=inside)

    # S_k, and with it the probability that this step's candidate and all before it are accepted.
    survival = tl.load(survival_ptr + reqs, mask=inside, other=1.0)
    own = sigmoid(tl.load(slopes_ptr) * log_odds + tl.load(this_ptr + position))
    accept = tl.where(scored, own, tl.load(means_ptr + position))
    survival = tl.where(running & (position > 0), survival * accept, survival)
    tl.store(survival_ptr + reqs, survival, mask=inside)
    reach = survival
    if LAG == 1:
        accept, log_odds = following(log_odds, scored, position, slopes_ptr, this_ptr, next_ptr, means_ptr)
        reach *= accept

    # Who goes on: the best number of requests and the best number of candidates ahead.
    num_tokens = tl.load(batch_ptr) + tl.sum(lengths, axis=0)  # to verify without this step's candidates
    stop_seconds = seconds(verify_seconds_ptr, verify_size, num_tokens + num_running)
    product, value = reach, tl.zeros([BLOCK_REQS], tl.float32)
    best_gain, best_count = 0.0, 0
    chosen = reqs < 0
    for ahead in range(1, horizon + 1):
        accept, log_odds = following(
            log_odds, scored, position + LAG + ahead - 1, slopes_ptr, this_ptr, next_ptr, means_ptr
        )
        product *= accept
        value += tl.where(ahead <= room, product, 0.0)
        counts, tokens = standing(value, running, num_reqs, BLOCK_REQS, BLOCK_RANK)
        verify = seconds(verify_seconds_ptr, verify_size, num_tokens + num_running + counts * ahead) - stop_seconds
        gain = tokens - rate * (ahead * tl.load(step_seconds_ptr + counts) + verify)
        # A single request cannot get as far as it has no room for.
        gain = tl.where(running & ((num_running > 1) | (ahead <= room)), gain, float("-inf"))
        top = tl.max(gain, axis=0)
        count = tl.min(tl.where(gain == top, counts, BLOCK_REQS + 1), axis=0)
        better = (top > best_gain) | ((top == best_gain) & (count < best_count))
        best_gain, best_count = tl.where(better, top, best_gain), tl.where(better, count, best_count)
        chosen = tl.where(better, running & (counts <= count), chosen)
    chosen = chosen & (room > 0)

    # Now and then one request goes on that does not pay, from time set apart for it: scores that are never followed up
    # would never be learnt about.
    best_reach = tl.max(tl.where(running & (room > 0), reach, -1.0), axis=0)
    best_req = tl.min(tl.where(running & (room > 0) & (reach == best_reach), reqs, BLOCK_REQS), axis=0)
    budget, price = tl.load(explore_ptr), tl.load(step_seconds_ptr + 1)
    nobody = tl.sum(chosen.to(tl.int32), axis=0) == 0
    explores = nobody & (best_reach >= 0) & (budget >= price) & (held == 0)
    chosen = chosen | (explores & (reqs == best_req))
    tl.store(explore_ptr, tl.where(explores, budget - price, budget))

    # Who submits: those who go on, and whose last look is worth its row.
    submits = running
    if DROP_LAST:
        stops = running & (chosen == 0)
        base = num_tokens + tl.sum(chosen.to(tl.int32), axis=0)
        counts, tokens = standing(reach, stops, num_reqs, BLOCK_REQS, BLOCK_RANK)
        verify = seconds(verify_seconds_ptr, verify_size, base + counts)
        verify -= seconds(verify_seconds_ptr, verify_size, base)
        gain = tl.where(stops, tokens - rate * verify, float("-inf"))
        top = tl.maximum(tl.max(gain, axis=0), 0.0)
        # Of equal gains the widest: nothing is dropped without need.
        count = tl.max(tl.where(gain == top, counts, 0), axis=0)
        submits = chosen | (stops & (counts <= count))
        # A probe that submits nothing would teach nothing.
        nothing = tl.sum(submits.to(tl.int32), axis=0) == 0
        submits = submits | ((tl.load(probe_ptr) != 0) & (step == 1) & nothing & stops & (counts == 1))
    chosen = tl.where(held, running & (room > 0), chosen)
    submits = tl.where(held, running, submits)

    expected = tl.load(expected_ptr + reqs, mask=inside, other=0.0)
    tl.store(expected_ptr + reqs, expected + tl.where(submits, reach, 0.0), mask=inside)
    tl.store(lengths_ptr + reqs, lengths + submits.to(tl.int32), mask=inside)
    # Only from here on the drawn token matters: it is recorded, and may be one that ends the draft.
    token_ids = tl.load(token_ids_ptr + reqs, mask=inside, other=-1)
    column = reqs.to(tl.int64) * draft_stride + (step - 1)
    tl.store(draft_tokens_ptr + column, tl.where(submits, token_ids, -1), mask=inside)
    ends = ends_draft(token_ids, reqs, inside, stop_token_ids_ptr, stop_stride, num_stop, BLOCK_STOP)
    go_on = (chosen & (ends == 0)).to(tl.int32)
    tl.store(running_ptr + reqs, go_on, mask=inside)
    tl.store(any_running_ptr, tl.max(go_on, axis=0) != 0)


def cost_aware_tail(
    scores: Tensor,
    token_ids: Tensor,
    step: int,
    *,
    survival: Tensor,
    expected: Tensor,
    lengths: Tensor,
    running: Tensor,
    params: CostAwareParams,
    stop_token_ids: Tensor,
    draft_tokens: Tensor,
    any_running: Tensor,
    scores_log: Tensor,
    widths: Tensor,
    lag: int = 0,
    drop_last: bool = True,
) -> None:
    """Decide about candidate ``step`` and the next one of every request, and take in the draw. In place; never waits.

    The decision is a function of the scores, the state and ``params``, all known before the draw: the token is only
    recorded and compared with the stop tokens.

    Args:
        scores: [num_reqs] float32, acceptance of candidate k (``lag`` 0) or k - 1 (``lag`` 1); NaN: no score.
        token_ids: [num_reqs] int64 drawn at this step.
        step: k, 1-based.
        survival: [num_reqs] float32, 1 before the first step.
        expected: [num_reqs] float32, estimated number of accepted candidates; 0 before the first step.
        lengths: [num_reqs] int32, candidates submitted; 0 before the first step.
        running: [num_reqs] int32, 1 for requests that look at candidate k; afterwards for those that draw k + 1.
        params: the round's; ``explore_seconds`` may be spent.
        stop_token_ids: [num_reqs, num_stop] int64, padded with -1; num_stop may be 0.
        draft_tokens: [num_reqs, K] int64 of any row stride; column k - 1 gets the token, -1 where none is submitted.
        any_running: [1] int32 or bool, whether somebody draws candidate k + 1.
        scores_log: [K, num_reqs] float32 of any row stride; row k - 1 gets the log-odds seen, NaN where none.
        widths: [K] int32; entry k - 1 gets the number of requests that looked.
        lag: which candidate a score is of.
        drop_last: whether a request may leave out the candidate it just looked at.

    Raises:
        ValueError: one line: a tensor of another shape, dtype, device or stride, more than 1024 requests, or a step
            without a column.
    """
    check_arguments(
        "cost_aware_tail", scores, token_ids, step, survival, expected, lengths, running, params, stop_token_ids,
        draft_tokens, any_running, scores_log, widths, lag,
    )  # fmt: skip
    num_reqs = scores.shape[0]
    if num_reqs > MAX_REQS:
        raise ValueError(
            f"specdecpp: cost_aware_tail: {num_reqs} requests in a batch, must be {MAX_REQS} or fewer; "
            "call cost_aware_tail_torch, or lower max_num_seqs"
        )
    check_launch("cost_aware_tail", _cost_aware_tail_kernel, scores.device)
    _cost_aware_tail_kernel[(1,)](
        scores, token_ids, survival, expected, lengths, running, stop_token_ids, draft_tokens, any_running, scores_log,
        widths, *params.tensors().values(), num_reqs, stop_token_ids.shape[1], stop_token_ids.stride(0),
        draft_tokens.stride(0), scores_log.stride(0), step, params.step_seconds.numel(), params.verify_seconds.numel(),
        HORIZON, LAG=lag, DROP_LAST=drop_last, **sizes(num_reqs), **options(num_reqs),
    )  # fmt: skip
