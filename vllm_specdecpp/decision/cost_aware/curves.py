# SPDX-License-Identifier: Apache-2.0
"""One measured cost curve: seconds of a step by its width (rows), kept fresh by real steps."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_MEMORY = 24.0
"""Steps of one width that its own estimate remembers."""
_SHRINK = 2.0
"""How many steps of its own a width needs to weigh as much as its neighbours; and these as much as all widths."""
_FADE = 0.998
"""What a width's own steps still weigh after each later step: an old estimate gives way to the common drift."""
_EXACT, _RATIO, _REACH = 24, 1.03, 0.08
"""Widths up to 24 stand alone; wider ones share bins 3 % wide, which share with bins within about 8 %."""
_OUTLIER, _SPREADS = 0.5, 6.0
"""A log-ratio beyond both of these is no news of the width: compilation, a prefill, another process's burst."""
_LEVEL_SHIFT = 10
"""So many outliers in a row, all on one side, are a new level."""


class Curve:
    """Seconds by width. Nothing is assumed of its shape: a wider step may cost less (padding, other kernels).

    Between measured widths the curve is linear; beyond them it goes on with the slope of the upper half; below them it
    is flat. A real step moves its own width by a Huber step, and all widths by a common drift (other load on the
    machine, longer contexts), to which widths that were not seen lately return.

    Args:
        seconds: width to seconds, one or more points.
        max_width: the widest step that will be asked for.

    Raises:
        ValueError: no point, a width below 1, or a time that is no positive number.
    """

    def __init__(self, seconds: Mapping[int, float], max_width: int) -> None:
        if not seconds:
            raise ValueError("specdecpp: a cost curve has no measured width; measure one or more")
        for width, value in seconds.items():
            if width < 1 or not (math.isfinite(value) and value > 0):
                raise ValueError(f"specdecpp: cost of width {width} is {value}, must be a positive time; measure again")
        self.widths = sorted(seconds)
        self.max_width = max(max_width, self.widths[-1])
        self._start = _dense([seconds[w] for w in self.widths], self.widths, self.max_width)  # [max_width + 1]
        edges = [*range(1, min(_EXACT, self.max_width) + 1)]
        while edges[-1] < self.max_width:
            edges.append(max(edges[-1] + 1, math.ceil(edges[-1] * _RATIO)))
        self._bin = np.searchsorted(edges, np.arange(self.max_width + 1))  # width -> bin; bins end at their edge
        ends = np.array(edges, dtype=np.float64)
        distance = np.abs(np.log(ends[:, None] / ends[None]))
        self._near = np.exp(-0.5 * (distance / _REACH) ** 2) * (distance > 0)  # [num_bins, num_bins]
        self._log_ratio = np.zeros(len(edges))  # per bin: log of real seconds over the start's
        self._weight = np.zeros(len(edges))  # per bin: steps seen, faded
        self._spread = 0.05  # typical |log-ratio| of a step
        self._outliers: list[tuple[int, float]] = []  # width, residual
        self._table: Array | None = None

    def table(self) -> Array:
        """[max_width + 1] seconds; index 0 is 0."""
        if self._table is None:
            own = self._weight * self._log_ratio
            drift = own.sum() / (self._weight.sum() + _SHRINK)
            nearby = (self._near @ own + _SHRINK * drift) / (self._near @ self._weight + _SHRINK)
            self._table = self._start * np.exp((own + _SHRINK * nearby) / (self._weight + _SHRINK))[self._bin]
        return self._table

    def freshness(self, width: int) -> float:
        """Steps of this width, or close to it, that the estimate rests on; old ones count less."""
        return float(self._weight[self._bin[min(width, self.max_width)]])

    def at(self, width: int) -> float:
        """Seconds of one step; beyond ``max_width`` the last slope goes on."""
        table = self.table()
        if width <= self.max_width:
            return float(table[width])
        return float(table[-1] + (table[-1] - table[-2]) * (width - self.max_width))

    def observe(self, width: int, seconds: float) -> bool:
        """Take in a real step. Returns whether it counted; an outlier does not."""
        if not 1 <= width <= self.max_width or not (math.isfinite(seconds) and seconds > 0):
            return False
        return self.nudge(width, math.log(seconds / self.at(width)))

    def nudge(self, width: int, residual: float, weight: float = 1.0) -> bool:
        """Take in that a step took exp(residual) times what the curve says.

        Args:
            width: of the step.
            residual: log of real over expected seconds.
            weight: up to 1; less where the time was shared with other steps.
        """
        if abs(residual) > max(_OUTLIER, _SPREADS * self._spread):
            if self._outliers and (residual > 0) != (self._outliers[-1][1] > 0):
                self._outliers.clear()
            self._outliers.append((width, residual))
            if len(self._outliers) >= _LEVEL_SHIFT:
                self._shift_level()
            return False
        self._outliers.clear()
        self._spread += 0.02 * (abs(residual) - self._spread)
        bound = max(3 * self._spread, 0.02)
        self._weight *= _FADE
        # Huber: a residual far out moves the estimate no more than one at the bound.
        target = math.log(float(self.table()[width]) / float(self._start[width])) + min(max(residual, -bound), bound)
        bin_ = self._bin[width]
        self._weight[bin_] = min(self._weight[bin_] + weight, _MEMORY)
        self._log_ratio[bin_] += weight * (target - self._log_ratio[bin_]) / self._weight[bin_]
        self._table = None
        return True

    def _shift_level(self) -> None:
        """What looked like outliers is how things are now; widths that were not among them follow by the drift."""
        table = self.table()
        for width in {w for w, _ in self._outliers}:
            residual = float(np.median([r for w, r in self._outliers if w == width]))
            bin_ = self._bin[width]
            self._log_ratio[bin_] = math.log(float(table[width]) / float(self._start[width])) + residual
            self._weight[bin_] = _MEMORY / 2
        self._outliers.clear()
        self._table = None

    def points(self) -> dict[int, float]:
        """The curve as it is now, at the measured widths and those seen often since."""
        ends = [int(np.flatnonzero(self._bin == bin_)[-1]) for bin_ in np.flatnonzero(self._weight >= 3)]
        return {width: self.at(width) for width in sorted({*self.widths, *ends})}


def _dense(seconds: list[float], widths: list[int], max_width: int) -> Array:
    table = np.interp(np.arange(max_width + 1), widths, seconds)
    last = widths[-1]
    if max_width > last:
        # The slope of the upper half: two neighbours may differ by noise or by a kernel's step alone.
        low = max((i for i, w in enumerate(widths) if w <= last / 2), default=0)
        slope = 0.0 if last == widths[low] else max(0.0, (seconds[-1] - seconds[low]) / (last - widths[low]))
        if len(widths) == 1:
            slope = 0.0
        table[last + 1 :] = seconds[-1] + slope * np.arange(1, max_width - last + 1)
    table[0] = 0.0
    return table
