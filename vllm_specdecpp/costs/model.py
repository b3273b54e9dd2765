# SPDX-License-Identifier: Apache-2.0
"""What a round costs, in seconds: first draft pass, further ones, reading, and the rest of the step (verification)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from vllm_specdecpp.costs.curves import Array, Curve

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
        self.first = Curve(first, max_reqs)
        self.step = Curve(step, max_reqs)
        self.verify = Curve(verify, max_tokens)
        if read is None:
            one, scale = self.verify.at(1), self.step.at(1) / self.verify.at(1)
            read = {w: scale * max(self.verify.at(w), one) for w in self.verify.widths}
        self.read = Curve(read, max_tokens)

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

    def observe(self, widths: Sequence[int], draft_seconds: float, num_tokens: int, verify_seconds: float) -> None:
        """Take in a real round. Leave out rounds with a prefill in them; bursts and compilation are seen as outliers.

        Args:
            widths: requests in each draft pass.
            draft_seconds: the whole draft phase.
            num_tokens: tokens that the target read after it.
            verify_seconds: from the end of this draft phase to the start of the next.
        """
        self.verify.observe(num_tokens, verify_seconds)
        expected = self.draft_seconds(widths)
        if expected <= 0 or not (math.isfinite(draft_seconds) and draft_seconds > 0):
            return
        # Only the sum is timed: each pass gets the same share of what it is off by, in seconds. Rounds of different
        # lengths then tell the first pass from the others, however wrong both are.
        share = 1 / len(widths)
        excess = share * (draft_seconds - expected)
        first = self.first.at(widths[0])
        self.first.nudge(widths[0], _log_ratio(excess, first), share, expected=first)
        counts: dict[int, int] = {}
        for width in widths[1:]:
            counts[width] = counts.get(width, 0) + 1
        passes = [(width, count * share, self.step.at(width)) for width, count in counts.items()]
        for width, weight, step in passes:
            self.step.nudge(width, _log_ratio(excess, step), weight, expected=step)

    def read_seconds(self, tokens: int) -> float:
        """Seconds of a draft pass that reads ``tokens``; 0 for none."""
        return self.read.at(tokens) if tokens > 0 else 0.0

    def extra_seconds(self, tokens: int) -> float:
        """Seconds that a first pass takes longer for reading ``tokens`` more of a request than the usual two."""
        return max(self.read.at(_USUAL + tokens) - self.read.at(_USUAL), 0.0)

    def observe_reading(self, tokens: int, seconds: float) -> None:
        """Take in a real draft pass that read ``tokens``."""
        self.read.observe(tokens, seconds)

    def observe_reading_round(self, widths: Sequence[int], draft_seconds: float, passes: Sequence[int]) -> None:
        """Take in a draft phase whose first pass read more than usual: what is left of its time was spent on reading.

        Args:
            widths: requests in each pass that drew; empty if nobody drafted.
            draft_seconds: the whole draft phase.
            passes: tokens of each pass that read, the first pass included.
        """
        usual = min(self.first.at(widths[0]), self.read_seconds(_USUAL * widths[0])) if widths else 0.0
        reading = draft_seconds - (self.draft_seconds(widths) - usual)
        expected = [self.read_seconds(tokens) for tokens in passes]
        for tokens, seconds in zip(passes, expected, strict=True):
            self.observe_reading(tokens, reading * seconds / sum(expected))

    def points(self) -> Points:
        """The curves as they are now: name -> width -> seconds."""
        return {name: getattr(self, name).points() for name in CURVES}


def _log_ratio(excess: float, expected: float) -> float:
    """Log of real over expected seconds; an excess that would leave next to nothing leaves a fifth."""
    return math.log(max(1 + excess / expected, 0.2))


def suggested_widths(max_width: int) -> list[int]:
    """Widths to measure: each up to 8, where kernels change most, then about 1.4 times the one before."""
    widths = list(range(1, min(8, max_width) + 1))
    while widths[-1] < max_width:
        widths.append(min(max_width, max(widths[-1] + 1, round(widths[-1] * 1.4))))
    return widths
