# SPDX-License-Identifier: Apache-2.0
"""What a round costs, in seconds: first draft pass, further draft passes, and the rest of the step (verification)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_specdecpp.costs.curves import Array, Curve

logger = logging.getLogger("vllm.specdecpp")

FORMAT = 1
CURVES = ("first", "step", "verify")


class CostModel:
    """Measured cost curves, refreshed by real rounds.

    Args:
        first: requests in the batch -> seconds of the round's first draft pass (the tokens just verified, and draw).
        step: requests that still draft -> seconds of one further draft pass with its draw.
        verify: tokens in the target's batch -> seconds of everything between two draft phases (the target's pass,
            sampling, scheduling), so that nothing of a round is left out.
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
        *,
        max_reqs: int = 64,
        max_tokens: int = 1024,
    ) -> None:
        self.first = Curve(first, max_reqs)
        self.step = Curve(step, max_reqs)
        self.verify = Curve(verify, max_tokens)

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

    def capped_seconds(self, num_reqs: int, widths: NDArray[np.int64]) -> Array:
        """[num_passes + 1] seconds of a round after 0, 1, ... draft passes.

        Args:
            num_reqs: in the batch.
            widths: [num_passes] requests in each pass; 0 once nobody may draft on.
        """
        seconds = self.verify.many(num_reqs + np.concatenate([[0], np.add.accumulate(widths)]))
        if len(widths):
            drafts = self.step.many(widths)
            drafts[0] = self.first.at(int(widths[0]))
            seconds[1:] += np.add.accumulate(drafts)
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

    def points(self) -> dict[str, dict[int, float]]:
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


class CostCache:
    """Cost curves on disk, one file for each setting.

    Args:
        folder: made when something is saved.
        key: what the times depend on: models, dtype, hardware, versions, tensor-parallel size, ...
    """

    def __init__(self, folder: Path, key: Mapping[str, str]) -> None:
        self.key = dict(key)
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:16]
        self.path = folder / f"costs-{digest}.json"

    @classmethod
    def read(cls, path: Path) -> tuple[dict[str, str], dict[str, dict[int, float]]]:
        """The setting and the curves in a file.

        Raises:
            ValueError: it is no such file, or it is damaged.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            key = {str(name): str(value) for name, value in data["key"].items()}
            return key, _points_of(data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"specdecpp: {path} is no file of measured costs, or damaged ({error!r})") from None

    def load(self) -> dict[str, dict[int, float]] | None:
        """The saved curves, or None: measure. A damaged file is logged and counts as none."""
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            if data["key"] != self.key:
                raise ValueError("another setting")
            return _points_of(data)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("specdecpp: costs file %s is damaged (%s); measuring anew", self.path, error)
            return None

    def save(self, points: Mapping[str, Mapping[int, float]]) -> bool:
        """Write the curves atomically. A full or read-only disk is logged, and costs the next start a measurement."""
        part = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        data = {"format": FORMAT, "key": self.key, **{name: dict(points[name]) for name in CURVES}}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
            os.replace(part, self.path)
        except OSError as error:
            logger.warning("specdecpp: cannot save the measured costs to %s (%s)", self.path, error)
            with contextlib.suppress(OSError):
                part.unlink()
            return False
        return True

    def load_or_measure(self, measure: Callable[[], Mapping[str, Mapping[int, float]]]) -> dict[str, dict[int, float]]:
        """The saved curves, else those that ``measure`` returns, which are saved."""
        points = self.load()
        if points is None:
            points = {name: dict(curve) for name, curve in measure().items()}
            self.save(points)
        return points


def _points_of(data: Any) -> dict[str, dict[int, float]]:
    """The curves in a file's JSON object; raises if they are not there, or are none."""
    if data["format"] != FORMAT:
        raise ValueError("another format")
    points = {name: {int(w): float(s) for w, s in data[name].items()} for name in CURVES}
    for curve in points.values():
        Curve(curve, 1)  # raises for an empty curve or a bad time
    return points
