# SPDX-License-Identifier: Apache-2.0
"""Costs on disk: the file that an engine leaves, and that its next start, ``tune`` and ``inspect`` read."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from vllm_specdecpp.costs.curves import Curve
from vllm_specdecpp.costs.model import CURVES, Points
from vllm_specdecpp.costs.widths import Rows, checked
from vllm_specdecpp.files import write_whole
from vllm_specdecpp.provenance import now

logger = logging.getLogger("vllm.specdecpp")

FORMAT = 3


@dataclass(frozen=True)
class KeptCosts:
    """What a file of costs holds.

    Raises:
        ValueError: a curve is missing, has no width, or a bad time; a bad width; or there is no date.
    """

    setting: Mapping[str, str]
    """What the times depend on: models, dtype, hardware, versions, tensor-parallel size, ..."""

    curves: Points
    """Name of each curve of :class:`CostModel` -> width -> seconds."""

    learnt: Mapping[str, Any] = field(default_factory=dict)
    """What the rule learnt while it served, as JSON."""

    rows: Rows = field(default_factory=dict)
    """At what widths the passes of these curves run; see :mod:`vllm_specdecpp.costs.widths`."""

    written: str = field(default_factory=now)
    """When, in ISO 8601 with a time zone."""

    def __post_init__(self) -> None:
        if self.curves.keys() != set(CURVES):
            raise ValueError(f"has the curves {', '.join(self.curves)} instead of {', '.join(CURVES)}")
        for curve in self.curves.values():
            Curve(curve, 1)
        checked(self.rows)
        self.age_seconds  # noqa: B018  raises for what is no date

    @property
    def age_seconds(self) -> float:
        """Since it was written; 0 if the clock was set back."""
        return max((datetime.now(timezone.utc) - datetime.fromisoformat(self.written)).total_seconds(), 0.0)


def read(path: Path) -> KeptCosts:
    """Read a file of costs.

    Raises:
        ValueError: one line: it cannot be read, is damaged, or is of another version.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.pop("format") != FORMAT:
            raise ValueError("of another version")
        data["curves"] = {name: {int(w): float(s) for w, s in curve.items()} for name, curve in data["curves"].items()}
        data["setting"] = {str(name): str(value) for name, value in data["setting"].items()}
        data["learnt"] = dict(data["learnt"])
        data["rows"] = checked(data["rows"])
        return KeptCosts(**data)
    except OSError as error:
        raise ValueError(f"specdecpp: costs file {path} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).removeprefix("specdecpp: ")
        raise ValueError(
            f"specdecpp: {path} is no costs file of format {FORMAT}, or is damaged ({reason!r}); an engine of the pair "
            "whose rule is cost_aware measures anew"
        ) from None


class CostFile:
    """The file of one setting, in a folder of such files.

    Args:
        folder: made when something is saved.
        setting: what the times depend on.

    Attributes:
        rows: the widths in force, to be saved with the costs.
    """

    def __init__(self, folder: Path, setting: Mapping[str, str]) -> None:
        self.setting, self.rows = dict(setting), Rows()
        digest = hashlib.sha256(json.dumps(self.setting, sort_keys=True).encode()).hexdigest()[:16]
        self.path = folder / f"costs-{digest}.json"

    def load(self) -> KeptCosts | None:
        """What was saved last, or None: measure. A file that is damaged, or of another version, is logged."""
        if not os.path.exists(self.path):  # Path.exists raises where a folder may not be read
            return None
        try:
            kept = read(self.path)
            if kept.setting != self.setting:
                raise ValueError(f"specdecpp: {self.path} is of another setting")
        except ValueError as error:
            logger.warning("%s", error)
            return None
        return kept

    def save(self, curves: Points, learnt: Mapping[str, Any] | None = None) -> bool:
        """Write the file whole or not at all. A full or read-only disk is logged; the next start measures then.

        Args:
            curves: of :meth:`CostModel.points`.
            learnt: values of JSON.
        """
        kept = KeptCosts(self.setting, curves, learnt or {}, self.rows)
        try:
            write_whole(self.path, (json.dumps({"format": FORMAT, **asdict(kept)}, indent=1) + "\n").encode())
        except ValueError as error:
            logger.warning("%s", error)
            return False
        return True
