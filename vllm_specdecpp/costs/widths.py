# SPDX-License-Identifier: Apache-2.0
"""How many rows to run when a few are wanted: on CPUs some widths cost less than narrower ones.

oneDNN picks another kernel for one and two rows than for three to six, and on some machines a slower one. Padding
changes no result (padded rows write no KV and are cut off), so the width is a matter of measured time alone. On GPUs
the widths are those of the captured CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

MAX_ROWS = 8
MIN_GAIN = 0.03
"""A wider pass must be this much cheaper: less is noise."""
PASSES = ("draft", "logits", "target")

Rows = dict[str, list[int]]
"""Pass -> [MAX_ROWS] rows to run 1, 2, ... rows with. One that is missing runs at its own width."""


def cheapest_rows(times: Mapping[int, float]) -> list[int]:
    """[MAX_ROWS] rows to run 1, 2, ... rows with: those of a wider pass, if that was timed to be cheaper.

    Args:
        times: rows -> seconds of a pass; between two that were timed the line counts.
    """
    rows, timed = [], sorted(times)
    for num in range(1, MAX_ROWS + 1):
        own = float(np.interp(num, timed, [times[n] for n in timed]))
        best = min((n for n in timed if num < n <= MAX_ROWS), key=times.__getitem__, default=num)
        rows.append(best if best > num and times[best] < (1 - MIN_GAIN) * own else num)
    return rows


def padded(rows: Sequence[int], num_rows: int) -> int:
    """The width to run ``num_rows`` rows with, at least ``num_rows``."""
    return rows[num_rows - 1] if 0 < num_rows <= len(rows) else num_rows


def padded_times(times: Mapping[int, float], rows: Sequence[int]) -> dict[int, float]:
    """Rows -> seconds once passes run at the width that ``rows`` gives."""
    return {num: times[padded(rows, num)] for num in times}
