# SPDX-License-Identifier: Apache-2.0
"""How many rows to run when a few are wanted: on CPUs some widths cost less than narrower ones.

oneDNN picks another kernel for one and two rows than for three to six, and on some machines a slower one. Padding
changes no result (padded rows write no KV and are cut off), so the width is a matter of measured time alone. On GPUs
the widths are those of the captured CUDA graphs, and nothing is measured here. Pure Python, no vLLM import.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

MAX_ROWS = 8
REPEATS = 5
MIN_GAIN = 0.03
"""A wider pass must be this much cheaper: less is noise."""


class RowWidths:
    """The cheapest width for each number of rows.

    Args:
        seconds: measured time of a pass of 1, 2, ... rows; empty leaves every width as it is.
    """

    def __init__(self, seconds: Sequence[float] = ()) -> None:
        self.seconds = tuple(seconds)
        self._cheapest = [self._find(n) for n in range(1, len(seconds) + 1)]

    def _find(self, num_rows: int) -> int:
        best = min(range(num_rows, len(self.seconds) + 1), key=lambda n: self.seconds[n - 1])
        return best if self.seconds[best - 1] < (1 - MIN_GAIN) * self.seconds[num_rows - 1] else num_rows

    def cheapest(self, num_rows: int) -> int:
        """The width to run ``num_rows`` rows with, at least ``num_rows``."""
        return self._cheapest[num_rows - 1] if 0 < num_rows <= len(self._cheapest) else num_rows


def measure(run: Callable[[int], object], max_rows: int = MAX_ROWS, repeats: int = REPEATS) -> list[float]:
    """Median seconds of ``run(1)`` ... ``run(max_rows)``, interleaved so that a slow moment hits every width."""
    samples: list[list[float]] = [[] for _ in range(max_rows)]
    for repeat in range(repeats + 1):
        for num_rows in range(1, max_rows + 1):
            start = time.perf_counter()
            run(num_rows)
            if repeat:  # the first run of a width builds its kernel
                samples[num_rows - 1].append(time.perf_counter() - start)
    return [statistics.median(s) for s in samples]
