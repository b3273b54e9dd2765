# SPDX-License-Identifier: Apache-2.0
"""Who goes on: the batch form of the cost-aware comparison, on plain arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


def best_extension(
    survival: Array, following: Array, room: NDArray[np.int64], rate: float, step_table: Array, verify_table: Array,
    num_tokens: int,
) -> Mask:  # fmt: skip
    """The requests that draw another candidate: those whose extra tokens pay for their time.

    With m more candidates for each of the n best requests the extra tokens are the sum of S * (g_1 + g_1 g_2 + ...),
    and the price is rate * (m * step[n] + verify[num_tokens + n m] - verify[num_tokens]). Every n and m is compared
    (m beyond 1 since a wider verification may cost less, and one more step after it more); the best pair, if it gains,
    says who goes on now. The next step decides anew, with what it then knows.

    Args:
        survival: [n] probability that all candidates up to this one are accepted.
        following: [n, horizon] acceptance of the next ones.
        room: [n] how many more candidates the request may have.
        rate: tokens per second.
        step_table: seconds of a draft step by requests.
        verify_table: seconds of a verification by tokens.
        num_tokens: tokens that would be verified if all stopped.

    Returns:
        [n] bool.
    """
    n, horizon = following.shape
    allowed = np.arange(1, horizon + 1) <= room[:, None]
    value = (survival[:, None] * np.cumprod(following, axis=1) * allowed).cumsum(axis=1)  # [n, horizon]
    if n == 1:
        tokens = num_tokens + np.arange(1, horizon + 1)
        prices = np.arange(1, horizon + 1) * step_table[1] + _at(verify_table, tokens) - _at(verify_table, num_tokens)
        return ((value[0] - rate * prices) * allowed[0]).max(keepdims=True) > 0
    order = np.argsort(-value, axis=0)  # [n, horizon]
    best = np.take_along_axis(value, order, axis=0).cumsum(axis=0)  # [n, horizon] of the best 1, 2, ... requests
    counts, ahead = np.arange(1, n + 1)[:, None], np.arange(1, horizon + 1)[None]
    prices = ahead * step_table[1 : n + 1, None]
    prices = prices + _at(verify_table, num_tokens + counts * ahead) - _at(verify_table, num_tokens)
    gain = best - rate * prices
    flat = int(gain.argmax())
    chosen = np.zeros(n, dtype=np.bool_)
    if gain.flat[flat] > 0:
        row, column = divmod(flat, horizon)
        chosen[order[: row + 1, column]] = True
        chosen &= room > 0
    return chosen


def best_submission(value: Array, rate: float, verify_table: Array, num_tokens: int) -> Mask:
    """The requests whose next candidate is worth its row in the verification, the draft pass being paid already.

    Args:
        value: [n] probability that the candidate, and all before it, are accepted.
        rate: tokens per second.
        verify_table: seconds of a verification by tokens.
        num_tokens: tokens verified without these candidates.

    Returns:
        [n] bool.
    """
    order = np.argsort(-value)
    counts = np.arange(len(value) + 1)
    gain = np.concatenate([[0.0], value[order].cumsum()]) - rate * _at(verify_table, num_tokens + counts)
    chosen = np.zeros(len(value), dtype=np.bool_)
    # Of equal gains the widest: nothing is dropped without need.
    chosen[order[: len(gain) - 1 - int(gain[::-1].argmax())]] = True
    return chosen


def _at(table: Array, index: NDArray[np.int64] | int) -> Array:
    """The table's entries; beyond its end the last slope goes on."""
    last = len(table) - 1
    beyond = np.maximum(np.asarray(index) - last, 0)
    return table[np.minimum(index, last)] + beyond * (table[-1] - table[-2])
