# SPDX-License-Identifier: Apache-2.0
"""What a round costs on a machine: measured seconds of drafting and of everything between two draft phases."""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm_specdecpp.data.manifest import write_whole

FORMAT = 1
_MOST_ROWS = 32
"""Of one request: the engine times wider verifications for batches."""

_UNSTEADY = 0.25
"""Of a draft pass: a standard error that can turn one candidate length's cost into another's."""
_MEDIAN_ERROR = 0.93
"""Standard error of a median: this times the quartiles' distance, over the root of the number of samples (normal)."""

_MEND = "measure again with: vllm-specdecpp measure"


@dataclass(frozen=True)
class Costs:
    """Step costs, in seconds. Measured points are kept; between two the cost is linear, beyond them it goes on so.

    Raises:
        ValueError: fewer than two points of a curve, a length below 1, or a time that is no positive number.
    """

    draft_seconds: Mapping[int, float]
    """Candidate length → one draft phase of a round, its first pass included."""

    verify_seconds: Mapping[int, float]
    """Tokens of a request that the target reads (candidates + 1) → everything between two draft phases."""

    off_seconds: float
    """Per token and request without speculation, prefill left out."""

    batch: int = 1
    """Requests that ran together."""

    machine: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    target: str = ""
    draft_model: str = ""
    """Of what pair the costs are; ``draft`` is taken by the method."""

    quartiles: Mapping[str, Mapping[str, list[float]]] = field(default_factory=dict)
    """Name of a curve → length → 25th and 75th percentile."""

    num_samples: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Name of a curve → length → steps measured."""

    def __post_init__(self) -> None:
        for name in ("draft_seconds", "verify_seconds"):
            curve = getattr(self, name)
            if len(curve) < 2:
                raise ValueError(f"specdecpp: {name} has {len(curve)} lengths, but needs 2 or more; {_MEND}")
            for length, seconds in curve.items():
                _check(length >= 1 and _positive(seconds), f"{name}[{length}]", seconds)
        _check(_positive(self.off_seconds), "off_seconds", self.off_seconds)
        _check(self.batch >= 1, "batch", self.batch)

    @property
    def max_length(self) -> int:
        """The longest measured candidate length: costs beyond it are extrapolated."""
        return max(self.draft_seconds)

    def draft(self, num_candidates: int) -> float:
        """Seconds of drafting ``num_candidates``; nothing for none."""
        return _read(self.draft_seconds, num_candidates) if num_candidates > 0 else 0.0

    def verify(self, num_rows: int) -> float:
        """Seconds between two draft phases when the target reads ``num_rows`` tokens of the request.

        One token, unless it was measured, takes what it takes without speculation.
        """
        if num_rows == 1 and 1 not in self.verify_seconds:
            return self.off_seconds
        return _read(self.verify_seconds, num_rows)

    def round(self, num_candidates: int) -> float:
        """Seconds of a whole round."""
        return self.draft(num_candidates) + self.verify(num_candidates + 1)

    def doubts(self) -> list[str]:
        """Why these times may be wrong, one line each: a longer draft that took less, or a median that is not sharp.

        Either comes from other work on the machine, or from too few rounds; what `tune` predicts is wrong by as much.
        """
        lengths = sorted(self.draft_seconds)
        seconds = [self.draft_seconds[k] for k in lengths]
        found = [
            f"drafting {b} candidates took {1000 * y:.0f} ms, {a} took {1000 * x:.0f}"
            for a, b, x, y in zip(lengths, lengths[1:], seconds, seconds[1:], strict=False)
            if y < x
        ]
        a_pass = (seconds[-1] - seconds[0]) / (lengths[-1] - lengths[0])
        for name, what in (("draft_seconds", "drafting {} candidates"), ("verify_seconds", "verifying {} tokens")):
            for length, (low, high) in self.quartiles.get(name, {}).items():
                samples = self.num_samples.get(name, {}).get(length, 0)
                error = _MEDIAN_ERROR * (high - low) / math.sqrt(samples) if samples else 0.0
                if error > _UNSTEADY * a_pass > 0:
                    found.append(
                        f"{what.format(length)}: standard error {1000 * error:.0f} ms, a draft pass takes "
                        f"{1000 * a_pass:.0f} ms"
                    )
        return found

    def save(self, path: Path, force: bool = False) -> None:
        """Write the costs as JSON.

        Raises:
            ValueError: the file exists and ``force`` is False, or it cannot be written.
        """
        check_free(path, force)
        write_whole(path, (json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> Costs:
        """Read what :meth:`save` wrote, or a file of costs that the engine keeps.

        Raises:
            ValueError: one line: no such file, no JSON, a missing or a bad value.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"specdecpp: costs file {path} cannot be read ({error.strerror}); {_MEND}") from None
        except ValueError as error:  # not JSON, or not UTF-8
            raise ValueError(f"specdecpp: costs file {path} is not valid JSON ({error}); {_MEND}") from None
        if isinstance(data, dict) and {"key", "first", "step", "verify"} <= data.keys():
            return cls._of_engine(path)
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise ValueError(f"specdecpp: costs file {path} is not of format {FORMAT}; {_MEND}")
        try:
            draft, verify = (_curve(data.pop(name)) for name in ("draft_seconds", "verify_seconds"))
            return cls(draft_seconds=draft, verify_seconds=verify, **data)
        except ValueError as error:
            raise ValueError(f"specdecpp: costs file {path}: {str(error).removeprefix('specdecpp: ')}") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"specdecpp: costs file {path} lacks or mistakes a field ({error}); {_MEND}") from None

    @classmethod
    def _of_engine(cls, path: Path) -> Costs:
        """Of a batch of one: a first draft pass, further ones, and the verification as the engine measured them."""
        from vllm_specdecpp.costs.model import CostCache

        setting, points = CostCache.read(path)
        if 1 not in points["verify"]:
            raise ValueError(f"specdecpp: costs file {path} has no verification of one token; {_MEND}")
        first, step = (points[name][min(points[name])] for name in ("first", "step"))
        longest = max([width for width in points["verify"] if width <= _MOST_ROWS] or [2]) - 1
        return cls(
            draft_seconds={k: first + (k - 1) * step for k in range(1, max(longest, 2) + 1)},
            verify_seconds=points["verify"],
            off_seconds=points["verify"][1],
            machine=setting.get("device", ""),
            versions={name: setting[name] for name in ("vllm", "torch") if name in setting},
            target=setting.get("target", ""),
            draft_model=setting.get("draft", ""),
        )


def check_free(path: Path, force: bool) -> None:
    """Refuse to overwrite a file.

    Raises:
        ValueError: it exists and ``force`` is False, or it is a folder.
    """
    if path.is_dir():
        raise ValueError(f"specdecpp: out={path} is a folder; name a file in it")
    if path.exists() and not force:
        raise ValueError(f"specdecpp: out={path} exists; give another name, or --force to replace it")


def _curve(raw: Mapping[str, Any]) -> dict[int, float]:
    return {int(length): float(seconds) for length, seconds in raw.items()}


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value > 0


def _check(good: bool, name: str, value: object) -> None:
    if not good:
        raise ValueError(f"specdecpp: {name}={value!r} is no positive number of that kind; {_MEND}")


def _read(curve: Mapping[int, float], length: int) -> float:
    """Piecewise linear; beyond the measured lengths the outermost piece goes on."""
    lengths = sorted(curve)
    if length in curve:
        return curve[length]
    right = min(max(bisect.bisect_left(lengths, length), 1), len(lengths) - 1)
    low, high = lengths[right - 1], lengths[right]
    slope = (curve[high] - curve[low]) / (high - low)
    if length > lengths[-1]:
        # A longer step that costs less is noise between two neighbours, and must not pay for endless rounds.
        return curve[high] + max(slope, 0.0) * (length - high)
    return max(curve[low] + slope * (length - low), 0.0)
