# SPDX-License-Identifier: Apache-2.0
"""Which free runs are taken, and how far, where only the device has seen them: ``FreeRuns.take`` in tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vllm_specdecpp.decision.tail_params import CostAwareParams
from vllm_specdecpp.decision.tails import seconds_at


class RowsBefore(NamedTuple):
    """What is submitted in front of the runs: ``free_runs.Before`` in tensors."""

    rows: Tensor
    """[] whole number."""
    tokens: Tensor
    """[] float64."""
    seconds: Tensor
    """[] float32."""
    survival: Tensor
    """[num_reqs] float32."""


class TakenRows(NamedTuple):
    """What is taken of each request's run."""

    accept: Tensor
    """[num_reqs, K] float32, chance of each candidate if all before it are accepted; 0 beyond the run."""
    lengths: Tensor
    """[num_reqs] int32, candidates taken."""
    accepted: Tensor
    """[num_reqs] float32, how many of them are expected to be accepted."""


def draft_seconds(widths: Tensor, params: CostAwareParams) -> Tensor:
    """[] float32, ``CostModel.draft_seconds`` of the requests in each pass, ``widths`` [K] int32; 0: there was none."""
    steps = torch.where(widths > 0, params.step_seconds[widths], 0.0)
    return params.first_seconds[widths[:1]].sum() + steps[1:].sum()


def take_rows(
    matches: Tensor, limits: Tensor, max_length: int, params: CostAwareParams, before: RowsBefore | None = None
) -> TakenRows:  # fmt: skip
    """The rows with the best chances, over the whole batch, as long as tokens per second rise. Waits for nothing.

    Args:
        matches: [num_reqs] whole numbers, tokens that match before each request's run; 0: it has none.
        limits: [num_reqs] int32, candidates at most.
        max_length: K, the longest run.
        params: of the round; ``run_odds``, ``run_shifts`` and ``verify_seconds`` are read.
        before: None: nothing but the last emitted token of each request.
    """
    num_reqs, device = len(matches), matches.device
    steps = torch.arange(max_length, device=device)
    there = (steps < limits[:, None]) & (matches[:, None] > 0)  # [num_reqs, K]
    x = (matches[:, None] + steps).clamp(min=1).float().log()
    odds = params.run_odds[0] * x + params.run_odds[2 : 2 + max_length]  # position 0 is nobody's
    odds = odds + params.run_shifts[:num_reqs, None]
    accept = torch.where(there, odds.clamp(-30, 30).sigmoid(), 0.0)
    reach = accept.cumprod(dim=1)
    first: int | Tensor = num_reqs
    emitted: int | Tensor = num_reqs
    spent: float | Tensor = 0.0
    if before is not None:
        first, emitted, spent = before.rows, before.tokens, before.seconds
        reach = reach * before.survival[:, None]
    chance, order = reach.flatten().sort(descending=True, stable=True)  # [num_reqs * K]
    tokens = emitted + torch.nn.functional.pad(chance.double().cumsum(0), (1, 0))
    count = torch.arange(len(tokens), device=device)
    speeds = tokens / (spent + seconds_at(params.verify_seconds, first + count))
    best = torch.where(count <= (chance > 0).sum(), speeds, -torch.inf).argmax()
    taken = torch.zeros_like(order, dtype=torch.bool).scatter_(0, order, count[1:] <= best).view_as(reach)
    return TakenRows(accept, taken.sum(dim=1).int(), torch.where(taken, reach, 0.0).sum(dim=1))
