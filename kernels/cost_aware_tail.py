# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""What follows the draw in every draft step under the cost-aware rule, in one launch: ``decision.tails``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_specdecpp.decision.tail_params import HORIZON, CostAwareParams

from .checks import FLAG, check_launch, check_step, check_tensor
from .cost_aware_device import MAX_LOG_ODDS, following, seconds, sigmoid, standing
from .stop_tokens import ends_draft

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
    """Launch options for a batch: a thread a request; no fused multiply-adds, as in torch."""
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
    base_ptr,
    price_ptr,
    slopes_ptr,
    this_ptr,
    next_ptr,
    drift_ptr,
    means_ptr,
    step_seconds_ptr,
    verify_seconds_ptr,
    levels_ptr,
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
    BLOCK_REQS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_STOP: tl.constexpr,
):
    """The n best requests draw m more candidates if those bring at least as many tokens as their time is worth:

        sum of S_k a_{k+1} + ... + S_k a_{k+1}...a_{k+m}  >=  price (m step[n] + verify[T + n m] - verify[T])

    for the best n and m; ``decision.tails.cost_aware_tail`` has the rest. One program: the whole batch is compared with
    itself.
    """
    reqs = tl.arange(0, BLOCK_REQS)
    inside = reqs < num_reqs
    running = tl.load(running_ptr + reqs, mask=inside, other=0) != 0
    lengths = tl.load(lengths_ptr + reqs, mask=inside, other=0)
    room = tl.load(limits_ptr + reqs, mask=inside, other=0) - lengths - 1
    levels = tl.load(levels_ptr + reqs, mask=inside, other=0.0)
    price = tl.load(price_ptr)
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
        accept, log_odds = following(log_odds, scored, position, levels, slopes_ptr, next_ptr, drift_ptr, means_ptr)
        reach *= accept

    # Who goes on: the best number of requests and the best number of candidates ahead.
    num_tokens = tl.load(base_ptr) + tl.sum(lengths, axis=0)  # to verify without this step's candidates
    stop_seconds = seconds(verify_seconds_ptr, verify_size, num_tokens + num_running)
    longest = tl.max(tl.where(running, room, 0), axis=0)
    product, value = reach, tl.zeros([BLOCK_REQS], tl.float32)
    best_gain, best_count = 0.0, 0
    chosen = reqs < 0
    for ahead in range(1, horizon + 1):
        accept, log_odds = following(
            log_odds, scored, position + LAG + ahead - 1, levels, slopes_ptr, next_ptr, drift_ptr, means_ptr
        )
        product *= accept
        value += tl.where(ahead <= room, product, 0.0)
        counts, tokens = standing(value, running, num_reqs, BLOCK_REQS, BLOCK_RANK)
        verify = seconds(verify_seconds_ptr, verify_size, num_tokens + num_running + counts * ahead) - stop_seconds
        gain = tokens - price * (ahead * tl.load(step_seconds_ptr + counts) + verify)
        # Nobody gets as far as there is no room for.
        gain = tl.where(running & (ahead <= longest), gain, float("-inf"))
        top = tl.max(gain, axis=0)
        # Of equals the most requests: at price 0 all, however little they bring.
        count = tl.max(tl.where(gain == top, counts, 0), axis=0)
        better = (top > best_gain) | ((top == best_gain) & (count > best_count))
        best_gain, best_count = tl.where(better, top, best_gain), tl.where(better, count, best_count)
        chosen = tl.where(better, running & (counts <= count), chosen)
    chosen = chosen & (room > 0)

    # Who submits: those who go on, and whose last look is worth its row.
    stops = running & (chosen == 0)
    base = num_tokens + tl.sum(chosen.to(tl.int32), axis=0)
    counts, tokens = standing(reach, stops, num_reqs, BLOCK_REQS, BLOCK_RANK)
    verify = seconds(verify_seconds_ptr, verify_size, base + counts)
    verify -= seconds(verify_seconds_ptr, verify_size, base)
    gain = tl.where(stops, tokens - price * verify, float("-inf"))
    top = tl.maximum(tl.max(gain, axis=0), 0.0)
    # Of equal gains the widest: nothing is dropped without need.
    count = tl.max(tl.where(gain == top, counts, 0), axis=0)
    submits = chosen | (stops & (counts <= count))

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
) -> None:
    """``decision.tails.cost_aware_tail`` in one launch, with the same arguments. In place; never waits.

    ``draft_tokens`` and ``scores_log`` may have any row stride.

    Raises:
        ValueError: one line: a tensor of another shape, dtype, device or stride, more than 1024 requests, or a step
            without a column.
    """
    _check(
        "cost_aware_tail", scores, token_ids, step, survival, expected, lengths, running, params, stop_token_ids,
        draft_tokens, any_running, scores_log, widths, lag,
    )  # fmt: skip
    num_reqs = scores.shape[0]
    if num_reqs > MAX_REQS:
        raise ValueError(
            f"specdecpp: cost_aware_tail: {num_reqs} requests in a batch, must be {MAX_REQS} or fewer; "
            "call decision.tails.cost_aware_tail, or lower max_num_seqs"
        )
    check_launch("cost_aware_tail", _cost_aware_tail_kernel, scores.device, "decision.tails.cost_aware_tail")
    _cost_aware_tail_kernel[(1,)](
        scores, token_ids, survival, expected, lengths, running, stop_token_ids, draft_tokens, any_running, scores_log,
        widths, *params.tensors().values(), num_reqs, stop_token_ids.shape[1], stop_token_ids.stride(0),
        draft_tokens.stride(0), scores_log.stride(0), step, params.step_seconds.numel(), params.verify_seconds.numel(),
        HORIZON, LAG=lag, **sizes(num_reqs), **options(num_reqs),
    )  # fmt: skip


def _check(
    owner: str, scores: Tensor, token_ids: Tensor, step: int, survival: Tensor, expected: Tensor, lengths: Tensor,
    running: Tensor, params: CostAwareParams, stop_token_ids: Tensor, draft_tokens: Tensor, any_running: Tensor,
    scores_log: Tensor, widths: Tensor, lag: int,
) -> None:  # fmt: skip
    """Refuse arguments that do not fit together."""
    device, num_reqs = scores.device, scores.shape[0]
    for name, tensor, dtype in (
        ("scores", scores, torch.float32), ("token_ids", token_ids, torch.int64), ("survival", survival, torch.float32),
        ("expected", expected, torch.float32), ("lengths", lengths, torch.int32), ("running", running, torch.int32),
    ):  # fmt: skip
        check_tensor(owner, name, tensor, dtype, (num_reqs,), device)
    check_tensor(owner, "any_running", any_running, FLAG, (1,), device)
    check_tensor(owner, "stop_token_ids", stop_token_ids, torch.int64, (num_reqs, stop_token_ids.shape[-1]), device)
    max_length = draft_tokens.shape[-1]
    check_tensor(owner, "draft_tokens", draft_tokens, torch.int64, (num_reqs, max_length), device)
    check_tensor(owner, "scores_log", scores_log, torch.float32, (max_length, num_reqs), device)
    check_tensor(owner, "widths", widths, torch.int32, (max_length,), device)
    check_step(owner, step, max_length)
    if lag not in (0, 1):
        raise ValueError(f"specdecpp: {owner}: lag={lag} must be 0 or 1")
    for name, found, least in (
        ("limits", params.limits.numel(), num_reqs), ("means", params.means.numel(), max_length + HORIZON + 2),
    ):  # fmt: skip
        if found < least:
            raise ValueError(
                f"specdecpp: {owner}: params.{name} has room for {found}, must have for {least}; allocate params anew"
            )
    if params.price.device != device:
        raise ValueError(f"specdecpp: {owner}: params are on {params.price.device}, but scores on {device}")
