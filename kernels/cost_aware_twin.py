# SPDX-License-Identifier: Apache-2.0
"""The torch twin of the cost-aware tail, and what both ask of their arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import FLAG, check_step, check_tensor
from .cost_aware_device import MAX_LOG_ODDS, MIN_SLOPE
from .cost_aware_params import HORIZON, CostAwareParams


def cost_aware_tail_torch(
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
    """The twin of ``cost_aware_tail``, in torch, for any device and any number of requests."""
    check_arguments(
        "cost_aware_tail_torch", scores, token_ids, step, survival, expected, lengths, running, params, stop_token_ids,
        draft_tokens, any_running, scores_log, widths, lag,
    )  # fmt: skip
    position, ran = step - lag, running != 0  # [num_reqs]
    room = params.limits[: len(scores)] - lengths - 1
    num_running = ran.sum()
    widths[step - 1] = num_running

    scored = ran & ~scores.isnan() & (position > 0)
    score = torch.where(scored, scores, 0.5).clamp(0, 1)
    log_odds = torch.log(score / (1 - score)).clamp(-MAX_LOG_ODDS.value, MAX_LOG_ODDS.value)
    scores_log[step - 1] = torch.where(scored, log_odds, torch.nan)
    own = torch.sigmoid(params.slopes[0] * log_odds + params.this[position])
    accept = torch.where(scored, own, params.means[position])
    if position > 0:
        survival.copy_(torch.where(ran, survival * accept, survival))
    reach = survival
    following = _following_torch(log_odds, scored, position, HORIZON + lag, params)  # [num_reqs, HORIZON + lag]
    if lag:
        reach, following = reach * following[:, 0], following[:, 1:]

    num_tokens = params.num_reqs[0] + lengths.sum()
    ahead = torch.arange(1, HORIZON + 1, device=scores.device)
    steps = (reach[:, None] * following.cumprod(dim=1)).where(ahead <= room[:, None], 0.0)
    value = steps.cumsum(dim=1).where(ran[:, None], -1.0)  # [num_reqs, HORIZON]
    ordered, order = value.sort(dim=0, descending=True, stable=True)
    counts = torch.arange(1, len(scores) + 1, device=scores.device)[:, None]
    verify = _seconds_torch(params.verify_seconds, num_tokens + num_running + counts * ahead)
    verify = verify - _seconds_torch(params.verify_seconds, num_tokens + num_running)
    gain = ordered.cumsum(dim=0) - params.rate * (ahead * params.step_seconds[counts] + verify)
    reachable = (num_running > 1) | (ahead <= torch.where(ran, room, -1).amax())  # [HORIZON]
    gain = gain.where((counts <= num_running) & reachable, -torch.inf)
    best = gain.flatten().argmax()  # of equals the fewest requests, then the fewest candidates
    rank = order.argsort(dim=0)[:, best % HORIZON]  # [num_reqs]
    chosen = ran & (room > 0) & (rank <= best // HORIZON) & (gain.flatten()[best] > 0)

    hopes = torch.where(ran & (room > 0), reach, -1.0)
    price, held = params.step_seconds[1], params.held[0] != 0
    explores = ~chosen.any() & (hopes.amax() >= 0) & (params.explore_seconds[0] >= price) & ~held
    chosen = chosen | (explores & (torch.arange(len(scores), device=scores.device) == hopes.argmax()))
    params.explore_seconds.copy_(torch.where(explores, params.explore_seconds - price, params.explore_seconds))

    submits = ran
    if drop_last:
        stops = ran & ~chosen
        base = num_tokens + chosen.sum()
        ordered, order = torch.where(stops, reach, -1.0).sort(descending=True, stable=True)
        verify = _seconds_torch(params.verify_seconds, base + counts[:, 0])
        gain = ordered.cumsum(dim=0) - params.rate * (verify - _seconds_torch(params.verify_seconds, base))
        gain = gain.where(counts[:, 0] <= stops.sum(), -torch.inf)
        widest = torch.where(gain == gain.amax().clamp_min(0), counts[:, 0], 0).amax()
        rank = order.argsort()
        submits = chosen | (stops & (rank < widest))
        submits = submits | (~submits.any() & (params.probe[0] != 0) & (step == 1) & stops & (rank == 0))
    chosen = torch.where(held, ran & (room > 0), chosen)
    submits = torch.where(held, ran, submits)

    expected += torch.where(submits, reach, 0.0)
    lengths += submits
    draft_tokens[:, step - 1] = torch.where(submits, token_ids, -1)
    ends = (stop_token_ids == token_ids[:, None]).any(dim=1)
    running.copy_(chosen & ~ends)
    any_running.copy_(running.any())


def _following_torch(log_odds: Tensor, scored: Tensor, position: int, num: int, params: CostAwareParams) -> Tensor:
    """[num_reqs, num] acceptance of the candidates after the one at ``position``."""
    columns = []
    for at in range(position, position + num):
        after = params.slopes[1] * log_odds + params.next[at]
        columns.append(torch.where(scored, torch.sigmoid(after), params.means[at + 1]))
        log_odds = (after - params.this[at + 1]) / params.slopes[0].clamp_min(MIN_SLOPE.value)
        log_odds = log_odds.clamp(-MAX_LOG_ODDS.value, MAX_LOG_ODDS.value)
    return torch.stack(columns, dim=1)


def _seconds_torch(table: Tensor, index: Tensor) -> Tensor:
    """The table's entries; beyond its end the last slope goes on."""
    end = len(table) - 1
    return table[index.clamp(max=end)] + (index - end).clamp_min(0) * (table[-1] - table[-2])


def check_arguments(
    owner: str, scores: Tensor, token_ids: Tensor, step: int, survival: Tensor, expected: Tensor, lengths: Tensor,
    running: Tensor, params: CostAwareParams, stop_token_ids: Tensor, draft_tokens: Tensor, any_running: Tensor,
    scores_log: Tensor, widths: Tensor, lag: int,
) -> None:  # fmt: skip
    """Refuse arguments that do not fit together.

    Raises:
        ValueError: one line.
    """
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
    if params.rate.device != device:
        raise ValueError(f"specdecpp: {owner}: params are on {params.rate.device}, but scores on {device}")
