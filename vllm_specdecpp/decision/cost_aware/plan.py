# SPDX-License-Identifier: Apache-2.0
"""Who goes on: the batch form of the cost-aware comparison, on plain arrays."""

from __future__ import annotations

from collections.abc import Sequence

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
    if n == 1:
        verify = entries(verify_table, num_tokens, horizon + 1)
        args = following[0].tolist(), int(room[0]), rate, float(step_table[1]), verify
        return np.array([extends(float(survival[0]), *args)])
    ahead = np.arange(1, horizon + 1)
    value = survival[:, None] * np.multiply.accumulate(following, axis=1)
    value[ahead > room[:, None]] = 0.0
    value = np.add.accumulate(value, axis=1)  # [n, horizon]
    best = np.add.accumulate(-np.sort(-value, axis=0), axis=0)  # [n, horizon] of the best 1, 2, ... requests
    counts = np.arange(1, n + 1)[:, None]
    prices = ahead * _at(step_table, counts) + _at(verify_table, num_tokens + counts * ahead)
    gain = best - rate * (prices - entries(verify_table, num_tokens, 1)[0])
    flat = int(gain.argmax())
    chosen = np.zeros(n, dtype=np.bool_)
    if gain.flat[flat] > 0:
        row, column = divmod(flat, horizon)
        # Of equal values the first requests: the order is the same on every machine.
        chosen[np.argsort(-value[:, column], kind="stable")[: row + 1]] = True
        chosen &= room > 0
    return chosen


def extends(
    survival: float, following: Sequence[float], room: int, rate: float, step_seconds: float, verify: Sequence[float]
) -> bool:
    """:func:`best_extension` for one request, in floats.

    Args:
        survival, following, room, rate: of the request.
        step_seconds: of a draft step of one request.
        verify: seconds of a verification of num_tokens, num_tokens + 1, ... tokens: one more than ``following``.
    """
    value, last = 0.0, verify[0]
    for m, accept in enumerate(following[: max(room, 0)], 1):
        survival *= accept
        value += survival
        if value - rate * (m * step_seconds + verify[m] - last) > 0:
            return True
    return False


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
    order = np.argsort(-value, kind="stable")
    counts = np.arange(len(value) + 1)
    gain = np.concatenate([[0.0], value[order].cumsum()]) - rate * _at(verify_table, num_tokens + counts)
    chosen = np.zeros(len(value), dtype=np.bool_)
    # Of equal gains the widest: nothing is dropped without need.
    chosen[order[: len(gain) - 1 - int(gain[::-1].argmax())]] = True
    return chosen


def _at(table: Array, index: NDArray[np.int64]) -> Array:
    """The table's entries; beyond its end the last slope goes on."""
    last = len(table) - 1
    if int(index.max()) <= last:
        return table[index]
    beyond = np.maximum(index - last, 0)
    return table[np.minimum(index, last)] + beyond * (table[-1] - table[-2])


def entries(table: Array, start: int, num: int) -> list[float]:
    """``num`` entries of a table from ``start`` on; beyond its end the last slope goes on."""
    out: list[float] = table[start : start + num].tolist()
    if len(out) < num:
        out += _at(table, np.arange(start + len(out), start + num)).tolist()
    return out
