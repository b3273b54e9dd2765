# SPDX-License-Identifier: Apache-2.0
"""Costs on disk: the file that an engine leaves, and that its next start, ``tune`` and ``check`` read."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StrictInt, TypeAdapter, field_validator

from vllm_specdecpp.costs.model import CURVES, Points
from vllm_specdecpp.costs.widths import MAX_ROWS, PASSES, Rows
from vllm_specdecpp.files import read_json, write_whole

logger = logging.getLogger("vllm.specdecpp")

_Curve = Annotated[
    dict[Annotated[int, Field(ge=1)], Annotated[float, Field(gt=0, allow_inf_nan=False)]], Field(min_length=1)
]


class KeptCosts(BaseModel):
    """What a file of costs holds."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    format: Literal[3] = 3

    setting: dict[str, str]
    """What the times depend on: models, dtype, hardware, versions, tensor-parallel size, ..."""

    curves: dict[str, _Curve]
    """Name of each curve of :class:`CostModel` -> width -> seconds."""

    learnt: dict[str, Any] = {}
    """What the rule learnt while it served, as JSON."""

    rows: dict[str, list[StrictInt]] = {}
    """At what widths the passes of these curves run; see :mod:`vllm_specdecpp.costs.widths`."""

    written: AwareDatetime = Field(default_factory=lambda: datetime.now(timezone.utc))

    @field_validator("curves")
    @classmethod
    def _all_there(cls, curves: dict[str, _Curve]) -> dict[str, _Curve]:
        if curves.keys() != set(CURVES):
            raise ValueError(f"has the curves {', '.join(curves)} instead of {', '.join(CURVES)}")
        return curves

    @field_validator("rows")
    @classmethod
    def _wide_enough(cls, rows: dict[str, list[int]]) -> dict[str, list[int]]:
        for name, widths in rows.items():
            fits = len(widths) == MAX_ROWS and all(n <= width <= MAX_ROWS for n, width in enumerate(widths, 1))
            if name not in PASSES or not fits:
                raise ValueError(f"has the widths {widths} of {name}")
        return rows

    @property
    def age_seconds(self) -> float:
        """Since it was written; 0 if the clock was set back."""
        return max((datetime.now(timezone.utc) - self.written).total_seconds(), 0.0)


_ADAPTER = TypeAdapter(KeptCosts)


def read(path: Path) -> KeptCosts:
    """Read a file of costs.

    Raises:
        ValueError: one line: it cannot be read, is damaged, or is of another version.
    """
    return read_json(path, _ADAPTER, "an engine of the pair whose rule is cost_aware measures anew")


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
        fields: dict[str, Any] = {"curves": curves, "learnt": learnt or {}, "rows": self.rows}
        kept = KeptCosts(setting=self.setting, **fields)
        try:
            write_whole(self.path, (kept.model_dump_json(indent=1) + "\n").encode())
        except ValueError as error:
            logger.warning("%s", error)
            return False
        return True
