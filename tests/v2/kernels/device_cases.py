# SPDX-License-Identifier: Apache-2.0
"""Kernels that only call a device function, and what torch says of the same numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from tests.v2.kernels.cost_aware_cases import Case, load_params, make_round
from vllm_specdecpp.decision import tails


@triton.jit
def _following_kernel(
    x_ptr, out_ptr, levels_ptr, slopes_ptr, next_ptr, drift_ptr, means_ptr, position, num, FUNCTION: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    reqs = tl.arange(0, BLOCK)
    x, levels = tl.load(x_ptr + reqs), tl.load(levels_ptr + reqs)
    scored = x == x
    log_odds = tl.where(scored, x, 0.0)
    for j in range(0, num):
        accept, log_odds = FUNCTION(log_odds, scored, position + j, levels, slopes_ptr, next_ptr, drift_ptr, means_ptr)
        tl.store(out_ptr + j * BLOCK + reqs, accept)


@triton.jit
def _standing_kernel(
    values_ptr, members_ptr, counts_ptr, sums_ptr, num_reqs, FUNCTION: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    reqs = tl.arange(0, BLOCK)
    members = tl.load(members_ptr + reqs) != 0
    counts, sums = FUNCTION(tl.load(values_ptr + reqs), members, num_reqs, BLOCK, 16)
    tl.store(counts_ptr + reqs, counts)
    tl.store(sums_ptr + reqs, sums)


@triton.jit
def _seconds_kernel(table_ptr, index_ptr, out_ptr, size, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(out_ptr + lanes, FUNCTION(table_ptr, size, tl.load(index_ptr + lanes)))


def check_following(device: Any) -> None:
    """Acceptance of the next candidates, by position, with and without a score."""
    rng = np.random.default_rng(0)
    for position in range(8):
        round_ = make_round(Case(16, max_length=9), rng)
        params = load_params(round_)
        x = np.array([-8.0, 8.0, np.nan, *rng.normal(0, 3, 13).clip(-8, 8)])
        out = torch.empty(6, 16)
        _following_kernel[(1,)](
            torch.tensor(x).float(), out, params.levels, params.slopes, params.next, params.drift, params.means,
            position, 6, FUNCTION=device.following, BLOCK=16,
        )  # fmt: skip
        wanted = tails.following(torch.tensor(x).float(), position, 6, params)
        torch.testing.assert_close(out.T, wanted, rtol=2e-5, atol=0)


def check_standing(device: Any) -> None:
    """Counts and sums of the members that are as good or better, ties by number."""
    rng = np.random.default_rng(1)
    for num_reqs in (1, 15, 16, 17, 33, 64):
        values = rng.integers(0, 9, 64) / 8  # ties, and sums that float32 holds exactly
        members = (rng.random(64) < 0.7) & (np.arange(64) < num_reqs)
        counts, sums = torch.zeros(64, dtype=torch.int32), torch.zeros(64)
        _standing_kernel[(1,)](
            torch.tensor(values).float(), torch.tensor(members).int(), counts, sums, num_reqs,
            FUNCTION=device.standing, BLOCK=64,
        )  # fmt: skip
        ranked = [i for i in np.argsort(-values, kind="stable") if members[i]]
        for place, i in enumerate(ranked, 1):
            assert counts[i] == place and sums[i] == values[ranked[:place]].sum()


def check_seconds(device: Any) -> None:
    """Within a cost table, and beyond its end."""
    table, index, out = torch.tensor([0.0, 0.5, 0.7, 0.6]), torch.arange(8), torch.empty(8)
    _seconds_kernel[(1,)](table, index.int(), out, 4, FUNCTION=device.seconds, BLOCK=8)
    torch.testing.assert_close(out, tails.seconds_at(table, index), rtol=1e-6, atol=0)
    torch.testing.assert_close(out[4:], torch.tensor([0.5, 0.4, 0.3, 0.2]))


CHECKS = (check_following, check_standing, check_seconds)
