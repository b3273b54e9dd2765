# SPDX-License-Identifier: Apache-2.0
"""Which free runs are taken, and how far, where only the device has seen them: ``FreeRuns.take`` in tensors.

``vllm_specdecpp.kernels.runs`` has :func:`take_runs` and :func:`behind_drafts` in a few launches, and is tested against
these. Nothing here waits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vllm_specdecpp.decision.cost_aware.free_runs import WORTH
from vllm_specdecpp.decision.tail_params import CostAwareParams
from vllm_specdecpp.decision.tails import reach, seconds_at


class RowsBefore(NamedTuple):
    """What is submitted in front of the runs: ``free_runs.Before`` in tensors."""

    rows: Tensor
    """[1] int32."""
    tokens: Tensor
    """[1] float64."""
    seconds: Tensor
    """[1] float32."""
    survival: Tensor
    """[num_reqs] float32."""


class TakenRows(NamedTuple):
    """What is taken of each request's run."""

    lengths: Tensor
    """[num_reqs] int32, candidates taken."""
    accepted: Tensor
    """[num_reqs] float32, how many of them are expected to be accepted."""


def take_runs(
    tokens: Tensor, states: Tensor, last: Tensor, starts: Tensor, matches: Tensor, limits: Tensor,
    stop_token_ids: Tensor, drafts: Tensor, lengths: Tensor, params: CostAwareParams, before: RowsBefore | None,
    *, candidates: Tensor, accept: Tensor,
) -> TakenRows:  # fmt: skip
    """The rows with the best chances, over the whole batch, as long as tokens per second rise; a stop token ends a run.

    Args:
        tokens: [max_num_reqs, max_len] int32, by request state.
        states: [num_reqs] int32 or int64, the requests' states.
        last: [num_reqs] int64, where a request's last token stands.
        starts: [num_reqs] int64, where its run begins; one that comes to the last token goes on as a loop.
        matches: [num_reqs] int32, tokens that match before it; 0: it has none.
        limits: [num_reqs] int32, candidates at most.
        stop_token_ids: [num_reqs, num_stop] int64, padded with -1.
        drafts: [num_reqs] int32, 1 for the requests that draft.
        lengths: [num_reqs] int32, candidates that they have drafted.
        params: of the round; ``run_odds``, ``run_shifts`` and ``verify_seconds`` are read.
        before: of runs behind drafts. None: nothing but the last emitted token of each request.
        candidates: [num_reqs, K] int64, out: the runs of requests that do not draft, all else -1; or, behind drafts,
            of those that do, from their ``lengths`` on, all else as it was.
        accept: [num_reqs, K] float32, out: in the same places the chance of each candidate if all before are accepted.

    Returns:
        What is taken, of requests that draft what would be if they did not.
    """
    (num_reqs, max_length), device = candidates.shape, last.device
    steps = torch.arange(max_length, device=device)
    at = starts[:, None] + steps % (last + 1 - starts).clamp(min=1)[:, None]
    run = tokens[states.long()[:, None], at.clamp(max=tokens.shape[1] - 1)].long()  # [num_reqs, K]
    stops = (run[:, :, None] == stop_token_ids[:, None, :]).any(dim=2)
    room = torch.where(stops.any(dim=1), stops.int().argmax(dim=1) + 1, max_length)
    limits = torch.minimum(limits, room)
    there = (steps < limits[:, None]) & (matches[:, None] > 0)
    x = (matches[:, None] + steps).clamp(min=1).float().log()
    odds = params.run_odds[0] * x + params.run_odds[2 : 2 + max_length]  # position 0 is nobody's
    odds = odds + params.run_shifts[:num_reqs, None]
    chances = torch.where(there, odds.clamp(-30, 30).sigmoid(), 0.0)
    reaches = chances.cumprod(dim=1)
    first: int | Tensor = num_reqs
    emitted: int | Tensor = num_reqs
    spent: float | Tensor = 0.0
    if before is not None:
        first, emitted, spent = before.rows, before.tokens, before.seconds
        reaches = reaches * before.survival[:, None]
    chance, order = reaches.flatten().sort(descending=True, stable=True)  # [num_reqs * K]
    sums = emitted + WORTH * torch.nn.functional.pad(chance.double().cumsum(0), (1, 0))
    count = torch.arange(len(sums), device=device)
    speeds = sums / (spent + seconds_at(params.verify_seconds, first + count))
    best = torch.where(count <= (chance > 0).sum(), speeds, -torch.inf).argmax()
    taken = torch.zeros_like(order, dtype=torch.bool).scatter_(0, order, count[1:] <= best).view_as(reaches)
    found = TakenRows(taken.sum(dim=1).int(), torch.where(taken, reaches, 0.0).sum(dim=1))
    puts = (drafts > 0) if before is not None else (drafts == 0)
    place = steps - lengths[:, None]  # in the run
    there = puts[:, None] & (place >= 0) & (place < found.lengths[:, None])
    if before is None:
        candidates.fill_(-1)
    place = place.clamp(min=0)
    candidates.copy_(torch.where(there, run.gather(1, place), candidates))
    accept.copy_(torch.where(there, chances.gather(1, place), accept))
    return found


def behind_drafts(
    tokens: Tensor, states: Tensor, last: Tensor, max_lengths: Tensor, lengths: Tensor, draft_tokens: Tensor,
    stop_token_ids: Tensor, accepted: Tensor, *, drafts: Tensor, expected: Tensor, scores_log: Tensor, widths: Tensor,
    params: CostAwareParams, lag: int,
) -> tuple[Tensor, Tensor, RowsBefore]:  # fmt: skip
    """What runs behind the drafts go on from; the drafts are put down behind each request's tokens.

    Args:
        tokens, states, last, stop_token_ids: as in :func:`take_runs`; the former is written, from ``last`` + 1 on.
        max_lengths: [num_reqs] int32, candidates at most, those drafted included.
        lengths: [num_reqs] int32, candidates drafted.
        draft_tokens: [num_reqs, K] int64, -1 behind them.
        accepted: [num_reqs] float32, expected of the runs of requests that do not draft.
        drafts, expected, scores_log, widths, params, lag: :meth:`CostAwareTail.left`.

    Returns:
        [num_reqs] int64 where the last candidate stands; [num_reqs] int32 how many may follow it: none behind a stop
        token, or for a request that does not draft; and what is submitted.
    """
    at = (last[:, None] + 1 + torch.arange(draft_tokens.shape[1], device=last.device)).clamp(max=tokens.shape[1] - 1)
    rows = states.long()[:, None]
    # vLLM reads no further than a request's last token, and writes before it does.
    tokens[rows, at] = torch.where(draft_tokens >= 0, draft_tokens.int(), tokens[rows, at])
    end = draft_tokens.gather(1, (lengths[:, None] - 1).clamp(min=0).long())  # [num_reqs, 1]
    has_ended = ((end == stop_token_ids) & (end >= 0)).any(dim=1)
    limits = torch.where((drafts > 0) & ~has_ended, max_lengths - lengths, 0)
    emitted = (expected + torch.where(drafts > 0, 0.0, accepted)).double().sum() + len(lengths)
    spent = params.first_seconds[widths[:1]] + params.step_seconds[widths[1:]].sum()  # ``CostModel.draft_seconds``
    survival = reach(scores_log, widths, lengths, lag, params)
    return last + lengths, limits, RowsBefore(params.base + lengths.sum().int(), emitted.view(1), spent, survival)
