# SPDX-License-Identifier: Apache-2.0
"""One measured cost curve: seconds of a step by its width (rows), kept fresh by real steps."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_MEMORY = 24.0
"""A width's own estimate weighs at most this many steps; older ones are averaged away."""
_USED = 0.8 * _MEMORY
"""A curve with such a width is in use; a new level begins with half of :data:`_MEMORY`."""
_SHRINK = 2.0
"""Weight of each prior, in steps: a width's own steps are shrunk towards its neighbours' estimate, and that towards the
common drift."""
_FADE = 0.998
"""Factor on all weights at each step: a width that was not seen for long returns to the common drift."""
_REST = 16
"""Rounds without a step of this kind after which the weights fade: to do it each time would cost more."""
_UNUSED = 0.85
"""Factor on all weights then. Where stalls of 3 s had put an end to drafting (tests/unit/test_cost_aware_robust.py), it
is tried again after 270 rounds; with :data:`_FADE` alone after 1,270."""
_EXACT = 24
"""Widths up to this have an estimate each. Wider ones share bins, and the estimates of neighbouring bins are smoothed:
the rule asks what a few rows more cost, and the noise of single bins would drown that difference."""
_RATIO = 1.03
"""Width of such a bin: its end over the end of the bin before."""
_REACH = 0.15
"""Standard deviation, in log width, of how far a step tells of its neighbours: about 15 %."""
_PACE = 4.0
"""Steps that the pace of all of them is averaged over. Its own noise is in all prices alike, and turns no decision."""
_OUTLIER = 0.5
"""A step whose log of real over expected seconds exceeds this is an outlier: compilation, another process's burst."""
_SHIFT = 10
"""So many outliers in a row, all too slow or all too fast, are a new level: of all widths if no step between them was
normal, else, counted among the steps of one width alone, of that width."""
_FURTHEST = 6.0
"""Log-ratio to the start's that a broken clock can bring about at most."""
_TINY = 1e-12
"""Seconds; index 0 of a table is 0."""
_FORGOTTEN = 1e-9
"""Weights below this become 0: denormal numbers are slow."""


class Pace:
    """What all steps take lately, of both models: a factor on what the curves say of them.

    A busy machine slows all of them down. A curve that had to learn that by itself would say so of a width that nobody
    has run since, long after the machine is free again: of two ways to go on, the one not tried would look the dearer.

    Args:
        memory: steps that it is averaged over.

    Attributes:
        factor: 1 at the start.
    """

    def __init__(self, memory: float = _PACE) -> None:
        self.factor, self._share = 1.0, 1 / memory
        self._last = 0.0

    def take(self, residual: float) -> float:
        """A step took exp(residual) times what was expected; returns what of it the pace does not account for."""
        last, self._last = self._last, residual
        if abs(residual) > _OUTLIER and (abs(last) < _OUTLIER or last * residual < 0):
            return residual  # alone: what it tells is not of all steps
        self.factor *= math.exp(self._share * min(max(residual, -_OUTLIER), _OUTLIER))
        return (1 - self._share) * residual


class Curve:
    """Seconds by width. A wider step may cost less (padding, other kernels), if real steps say so.

    One that was measured to cost more than a wider one, and was not seen in service, is taken to cost the same as that:
    it may have been measured in a slow moment. Too low an estimate is soon put right; too high a one keeps drafts away
    from that width, and nobody would ever learn.

    Between measured widths the curve is linear, below the narrowest it is flat, and beyond the widest it has the mean
    slope of the wider half. Each real step moves the estimate of its own width, and a little that of its neighbours and
    of all widths: the common drift, caused by other load on the machine or longer contexts.

    Args:
        seconds: width to seconds, one or more points.
        max_width: the widest step that will be asked for.
        pace: shared with other curves; None: always the same.

    Raises:
        ValueError: no point, a width below 1, or a time that is no positive number.
    """

    def __init__(self, seconds: Mapping[int, float], max_width: int, pace: Pace | None = None) -> None:
        if not seconds:
            raise ValueError("specdecpp: a cost curve has no measured width; measure one or more")
        for width, value in seconds.items():
            if width < 1 or not (math.isfinite(value) and value > 0):
                raise ValueError(f"specdecpp: cost of width {width} is {value}, must be a positive time; measure again")
        self.pace = pace or Pace(math.inf)
        self.widths = sorted(seconds)
        self.max_width = max(max_width, self.widths[-1])
        self._start = _dense([seconds[w] for w in self.widths], self.widths, self.max_width)  # [max_width + 1]
        edges = [*range(1, min(_EXACT, self.max_width) + 1)]
        while edges[-1] < self.max_width:
            edges.append(max(edges[-1] + 1, math.ceil(edges[-1] * _RATIO)))
        self._bin = np.searchsorted(edges, np.arange(self.max_width + 1))  # width -> bin; bins end at their edge
        ends = np.array(edges, dtype=np.float64)
        distance = np.abs(np.log(ends[:, None] / ends[None]))
        wide = ends > _EXACT
        self._near = np.exp(-0.5 * (distance / _REACH) ** 2) * (distance > 0)  # [num_bins, num_bins]
        self._wide = wide.astype(np.float64)
        # Between two bins' ends the log-ratio is linear.
        place = np.interp(np.arange(self.max_width + 1), ends, np.arange(len(edges)))
        below = np.minimum(place.astype(np.int64), max(len(edges) - 2, 0))
        self._repeats, self._share = np.bincount(below), place - below
        # [own or neighbours', weight or weighted sum, bin]: weight in steps, sum of log(real seconds / start's).
        self._state = np.zeros((2, 2, len(edges)))
        self._outliers: list[tuple[int, float]] = []  # width, residual
        self._bin_outliers: dict[int, list[float]] = {}  # residuals in a row, by bin
        self._table: Array | None = None
        self._rested = 0

    def table(self) -> Array:
        """[max_width + 1] seconds; index 0 is 0."""
        return self._usual() * self.pace.factor

    def _usual(self) -> Array:
        """:meth:`table` at the pace of the start."""
        if self._table is None:
            seen = self._as_seen()
            falls = (seen[1:] < seen[:-1]).nonzero()[0]
            if len(falls):
                upto = seen[: falls[-1] + 2]  # from there on it only rises
                wider = np.minimum.accumulate(upto[::-1])[::-1]  # the least of this width and wider ones
                hills = np.flatnonzero(upto > wider)
                unseen = 1 / (1 + self._state[0, 0, self._bin[hills]])
                seen[hills] *= (np.maximum(wider[hills], _TINY) / seen[hills]) ** unseen
            self._table = seen
        return self._table

    def _as_seen(self) -> Array:
        """:meth:`_usual` with every hill believed."""
        (weight, own), (near_weight, near) = self._state
        drift = float(own.sum()) / (float(weight.sum()) + _SHRINK)
        nearby = (near + _SHRINK * drift) / (near_weight + _SHRINK)
        shrink = _SHRINK + self._wide * near_weight
        ratio = (own + shrink * nearby) / (weight + shrink)
        ratio = np.minimum(np.maximum(ratio, -_FURTHEST), _FURTHEST)
        # Each bin's end stands for all widths up to the next one's: to repeat it is quicker than to look it up.
        seen: Array = (ratio[1:] - ratio[:-1] if len(ratio) > 1 else ratio - ratio).repeat(self._repeats)
        seen *= self._share
        seen += ratio[: len(self._repeats)].repeat(self._repeats)
        np.exp(seen, out=seen)
        seen *= self._start
        return seen

    def freshness(self, width: int) -> float:
        """Weight of the real steps in this width's bin, in steps; old ones count less."""
        return float(self._state[0, 0, self._bin[min(width, self.max_width)]])

    def at(self, width: int) -> float:
        """Seconds of one step; beyond ``max_width`` the last slope goes on."""
        usual, factor = self._usual(), self.pace.factor
        if width <= self.max_width:
            return float(usual[width]) * factor
        return float(usual[-1] + (usual[-1] - usual[-2]) * (width - self.max_width)) * factor

    def many(self, widths: NDArray[np.int64]) -> Array:
        """:meth:`at` of each width, in the widths' shape."""
        usual, last, factor = self._usual(), self.max_width, self.pace.factor
        if int(widths.max(initial=0)) <= last:
            return usual[widths] * factor
        beyond = np.maximum(widths - last, 0)
        return (usual[np.minimum(widths, last)] + beyond * (usual[-1] - usual[-2])) * factor

    def upto(self, num: int) -> Array:
        """[num] :meth:`at` of width 0, 1, 2, ..."""
        usual = self._usual()
        return usual[:num] * self.pace.factor if num <= len(usual) else self.many(np.arange(num))

    def observe(self, width: int, seconds: float) -> bool:
        """Take in a real step. Returns whether it counted; an outlier does not."""
        if not 1 <= width <= self.max_width or not (math.isfinite(seconds) and seconds > 0):
            return False
        return self.nudge(width, self.pace.take(math.log(seconds / self.at(width))))

    def nudge(self, width: int, residual: float, weight: float = 1.0) -> bool:
        """Take in that a step took exp(residual) times what the curve says. Returns whether it counted.

        Args:
            width: of the step; one wider than the curve teaches nothing.
            residual: log of real over expected seconds, less what the pace accounts for.
            weight: in steps, at most 1; less where several steps were timed together.
        """
        if not 1 <= width <= self.max_width or not math.isfinite(residual):
            return False
        if abs(residual) > _OUTLIER:
            if self._outliers and (residual > 0) != (self._outliers[-1][1] > 0):
                self._outliers.clear()
            self._outliers.append((width, residual))
            if len(self._outliers) >= _SHIFT:
                self._shift_level()
            else:
                self._shift_bin(width, residual)
            return False
        self._outliers.clear()
        self._bin_outliers.pop(int(self._bin[width]), None)
        target = self._log_ratio(width) + residual
        self._age(_FADE)
        bin_ = self._bin[width]
        steps, total = self._state[0, :, bin_].tolist()
        ratio = total / steps if steps else 0.0
        steps = min(steps + weight, _MEMORY)
        self._set(bin_, steps, ratio + weight * (target - ratio) / steps)
        return True

    def rest(self) -> None:
        """A round went by without such a step: what was seen ages, so that in the end the start's curve stands
        again."""
        self._rested += 1
        if self._rested == _REST:
            self._age(_UNUSED)

    def _age(self, factor: float) -> None:
        self._state *= factor
        self._state[np.abs(self._state) < _FORGOTTEN] = 0.0
        self._table, self._rested = None, 0

    def _set(self, bin_: int, steps: float, ratio: float) -> None:
        """Set a bin's own estimate, and update what its neighbours take from it."""
        now = np.array([steps, steps * min(max(ratio, -_FURTHEST), _FURTHEST)])
        own, nearby = self._state
        nearby += (now - own[:, bin_])[:, None] * self._near[bin_]
        own[:, bin_] = now
        self._table = None

    def _shift_level(self) -> None:
        """The outliers are the new level: their widths start anew from them, all others follow by the drift."""
        seen: dict[int, list[float]] = {}
        for width, residual in self._outliers:
            seen.setdefault(width, []).append(residual)
        ratios = {width: self._log_ratio(width) + float(np.median(rs)) for width, rs in seen.items()}
        self._outliers.clear()
        self._bin_outliers.clear()
        self._state[:] = 0.0
        for width, ratio in ratios.items():
            self._set(self._bin[width], _MEMORY / 2, ratio)

    def _shift_bin(self, width: int, residual: float) -> None:
        """Outliers of one bin among normal steps of others: after enough of them that bin alone starts anew."""
        bin_ = int(self._bin[width])
        seen = self._bin_outliers.setdefault(bin_, [])
        if seen and (residual > 0) != (seen[-1] > 0):
            seen.clear()
        seen.append(residual)
        if len(seen) >= _SHIFT:
            del self._bin_outliers[bin_]
            ratio = self._log_ratio(width) + float(np.median(seen))
            self._set(bin_, _MEMORY / 4, ratio)

    def _log_ratio(self, width: int) -> float:
        return math.log(float(self._usual()[width]) / float(self._start[width]))

    def raised(self, seconds: float) -> Curve:
        """This curve with ``seconds`` more at every width: an overhead that was not measured with it."""
        usual = {width: (value + seconds) / self.pace.factor for width, value in self.points().items()}
        return Curve(usual, self.max_width, self.pace)

    def points(self, *, lasting: bool = False) -> dict[int, float]:
        """The curve as it was measured and seen, at the measured widths and those seen often since.

        Args:
            lasting: for the next start: at the pace of this start, and without few real steps that were slower than
                this start's curve. A slow spell that put an end to drafting would else be believed for ever.
        """
        ends = [int(np.flatnonzero(self._bin == bin_)[-1]) for bin_ in np.flatnonzero(self._state[0, 0] >= 3)]
        seen = self._as_seen()
        if lasting and self._state[0, 0].max() < _USED:
            seen = np.minimum(seen, self._start)
        if not lasting:
            seen = seen * self.pace.factor
        return {width: float(seen[width]) for width in sorted({*self.widths, *ends})}


def _dense(seconds: list[float], widths: list[int], max_width: int) -> Array:
    table = np.interp(np.arange(max_width + 1), widths, seconds)
    last = widths[-1]
    if max_width > last:
        # The slope of the upper half: two neighbours may differ by noise or by a kernel's step alone.
        low = max((i for i, w in enumerate(widths) if w <= last / 2), default=0)
        slope = 0.0 if last == widths[low] else max(0.0, (seconds[-1] - seconds[low]) / (last - widths[low]))
        table[last + 1 :] = seconds[-1] + slope * np.arange(1, max_width - last + 1)
    table[0] = 0.0
    return table
