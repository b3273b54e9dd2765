# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Which of the tokens just drawn end their request's draft: a device function that both tails call."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ends_draft(
    token_ids,  # [BLOCK_REQS] int64, not negative where it matters
    reqs,  # [BLOCK_REQS] int32 row of each request
    inside,  # [BLOCK_REQS] bool, whether there is such a request
    stop_token_ids_ptr,  # [num_reqs, num_stop] int64, padded with -1
    row_stride,
    num_stop,
    BLOCK_STOP: tl.constexpr,
):
    """[BLOCK_REQS] int32: 1 where the token is one of its request's stop tokens."""
    ends = tl.zeros_like(reqs)
    for start in range(0, num_stop, BLOCK_STOP):
        columns = start + tl.arange(0, BLOCK_STOP)
        there = inside[:, None] & (columns < num_stop)[None, :]
        rows = reqs.to(tl.int64)[:, None] * row_stride
        stops = tl.load(stop_token_ids_ptr + rows + columns[None, :], mask=there, other=-1)  # [BLOCK_REQS, BLOCK_STOP]
        ends |= tl.max((stops == token_ids[:, None]).to(tl.int32), axis=1)
    return ends
