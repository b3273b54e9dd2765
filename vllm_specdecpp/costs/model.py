# SPDX-License-Identifier: Apache-2.0
"""What a round costs, in seconds: first draft pass, further ones, reading, and the rest of the step (verification)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from vllm_specdecpp.costs.curves import Array, Curve, Pace

CURVES = ("first", "step", "verify", "read")

Points = dict[str, dict[int, float]]
"""Name of a curve -> width -> seconds."""

_USUAL = 2
"""Tokens of a request that a round's first pass reads, unless the draft model is behind."""


class CostModel:
    """Measured cost curves, refreshed by real rounds.

    Args:
        first: requests in the batch -> seconds of the round's first draft pass (the tokens just verified, and draw).
        step: requests that still draft -> seconds of one further draft pass with its draw.
        verify: tokens in the target's batch -> seconds of everything between two draft phases (the target's pass,
            sampling, scheduling), so that nothing of a round is left out.
        read: tokens, of all requests together -> seconds of a draft pass that reads them and draws nothing: a prompt,
            or what was emitted while nobody drafted. None: ``verify``, scaled by the ratio of a draft pass to a
            verification of one token.
        max_reqs: largest batch.
        max_tokens: most tokens of one verification.

    Raises:
        ValueError: an empty curve or a bad time.
    """

    def __init__(
        self,
        first: Mapping[int, float],
        step: Mapping[int, float],
        verify: Mapping[int, float],
        read: Mapping[int, float] | None = None,
        *,
        max_reqs: int = 64,
        max_tokens: int = 1024,
    ) -> None:
        self.pace = Pace()
        self.first = Curve(first, max_reqs, self.pace)
        self.step = Curve(step, max_reqs, self.pace)
        self.verify = Curve(verify, max_tokens, self.pace)
        if read is None:
            one, scale = self.verify.at(1), self.step.at(1) / self.verify.at(1)
            read = {w: scale * max(self.verify.at(w), one) for w in self.verify.widths}
        self.read = Curve(read, max_tokens, self.pace)

    def draft_seconds(self, widths: Sequence[int]) -> float:
        """Seconds of a draft phase.

        Args:
            widths: requests in each pass, the first pass first; empty for a round without drafting.
        """
        if not widths:
            return 0.0
        return self.first.at(widths[0]) + sum(self.step.at(width) for width in widths[1:])

    def round_seconds(self, widths: Sequence[int], num_tokens: int) -> float:
        """Seconds of a whole round that verifies ``num_tokens``, the last emitted token of each request among them."""
        return self.draft_seconds(widths) + self.verify.at(num_tokens)

    def fixed_seconds(self, num_reqs: int, max_length: int) -> Array:
        """[max_length + 1] seconds of a round with candidate length 0, 1, ... for every request."""
        seconds = self.verify.many(num_reqs * np.arange(1, max_length + 2))
        drafts = self.first.at(num_reqs) + self.step.at(num_reqs) * np.arange(max_length)
        seconds[1:] += drafts
        return seconds

    def observe_draft(self, widths: Sequence[int], seconds: float, read: Sequence[int] = ()) -> None:
        """Take in a real draft phase. Only the sum is timed: each part of it counts as its share of what was expected.

        So rounds of different lengths tell the first pass from the others, and those that read from those that do not.
        A curve that had no part in it ages: a slow spell that put an end to drafting would else be believed for ever.

        Args:
            widths: requests in each pass that drew; empty if nobody drafted.
            seconds: the whole draft phase.
            read: tokens of each pass that read more than usual, the first pass last; they are part of the phase.
        """
        parts = [(self.read, tokens, self.read_seconds(tokens)) for tokens in read]
        counts: dict[int, int] = {}
        for width in widths[1:]:
            counts[width] = counts.get(width, 0) + 1
        parts += [(self.step, width, count * self.step.at(width)) for width, count in counts.items()]
        if widths:
            drawing = self.first.at(widths[0])
            if read:  # its usual reading is one of the parts
                drawing -= min(drawing, self.read_seconds(_USUAL * widths[0]))
            parts.append((self.first, widths[0], drawing))
        used = [curve for curve, _, _ in parts]
        for curve in (self.first, self.step, self.read):
            if curve not in used:
                curve.rest()
        expected = sum(part for _, _, part in parts)
        if expected <= 0 or not (math.isfinite(seconds) and seconds > 0):
            return
        residual = self.pace.take(math.log(seconds / expected))
        for curve, width, part in parts:
            if part > 0:
                curve.nudge(width, residual, part / expected)

    def read_seconds(self, tokens: int) -> float:
        """Seconds of a draft pass that reads ``tokens``; 0 for none."""
        return self.read.at(tokens) if tokens > 0 else 0.0

    def extra_seconds(self, tokens: int) -> float:
        """Seconds that a first pass takes longer for reading ``tokens`` more of a request than the usual two."""
        return max(self.read.at(_USUAL + tokens) - self.read.at(_USUAL), 0.0)

    def points(self, *, lasting: bool = False) -> Points:
        """The curves as they are now: name -> width -> seconds; ``lasting`` as in :meth:`Curve.points`."""
        return {name: getattr(self, name).points(lasting=lasting) for name in CURVES}


def suggested_widths(max_width: int) -> list[int]:
    """Widths to measure: each up to 8, where kernels change most, then about 1.4 times the one before."""
    widths = list(range(1, min(8, max_width) + 1))
    while widths[-1] < max_width:
        widths.append(min(max_width, max(widths[-1] + 1, round(widths[-1] * 1.4))))
    return widths
