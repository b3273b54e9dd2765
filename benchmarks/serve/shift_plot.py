# SPDX-License-Identifier: Apache-2.0
"""Tokens/s and calibration error over a shifting workload: the curves, the figures of each phase, the plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.records import Row

WINDOW = 4
"""Groups of prompts that a point of a curve covers."""


def calibration_error(rows: Sequence[Row]) -> float | None:
    """Expected calibration error over some groups of prompts; None where the engine told none."""
    tables = [row["reliability"] for row in rows if row["reliability"]]
    sums = {key: np.sum([table[key] for table in tables], axis=0) for key in ("num", "probability", "accepted")}
    if not tables or sums["num"].sum() <= 0:
        return None
    return float(np.abs(sums["probability"] - sums["accepted"]).sum() / sums["num"].sum())


def rate(rows: Sequence[Row]) -> float:
    """Tokens/s over some groups of prompts."""
    return float(sum(row["tokens"] for row in rows) / sum(row["seconds"] for row in rows))


def windows(rows: Sequence[Row], size: int = WINDOW) -> list[list[Row]]:
    """For each group of one engine the last ``size`` ones, without those of the phase before."""
    return [
        [earlier for earlier in rows[max(0, i + 1 - size) : i + 1] if earlier["phase"] == row["phase"]]
        for i, row in enumerate(rows)
    ]


def _of_variant(rows: Sequence[Row]) -> dict[str, list[Row]]:
    return {name: [row for row in rows if row["variant"] == name] for name in dict.fromkeys(r["variant"] for r in rows)}


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Tokens/s and calibration error of every phase and engine."""
    result: dict[str, Any] = {}
    for name, theirs in _of_variant(rows).items():
        for phase in dict.fromkeys(row["phase"] for row in theirs):
            chosen = [row for row in theirs if row["phase"] == phase]
            figures = {"tokens_per_second": rate(chosen)}
            if (error := calibration_error(chosen)) is not None:
                figures["calibration_error"] = error
            result.setdefault(phase, {})[name] = {key: round(value, 4) for key, value in figures.items()}
    return result


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Sliding tokens/s (and below it the calibration error, where the engine tells it) over the prompts answered."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with_errors = calibration_error(rows) is not None
    figure, grid = pyplot.subplots(
        1 + with_errors, 1, figsize=(9, 3.2 * (1 + with_errors)), sharex=True, squeeze=False, layout="constrained"
    )
    panels = [panel for (panel,) in grid]
    for name, theirs in _of_variant(rows).items():
        answered = [row["answered"] for row in theirs]
        (line,) = panels[0].plot(answered, [rate(chosen) for chosen in windows(theirs)], marker=".", label=name)
        if all(row["rho"] is not None for row in theirs):
            own = [row["rho"] for row in theirs]
            panels[0].plot(answered, own, linestyle=":", color=line.get_color(), label=f"{name}: the rule's rho")
        if with_errors:
            errors = [calibration_error(chosen) for chosen in windows(theirs)]
            panels[1].plot(answered, [np.nan if e is None else e for e in errors], marker=".", label=name)
    panels[0].set_ylabel(f"tokens/s, last {WINDOW} groups")
    panels[0].legend(fontsize=8)
    if with_errors:
        panels[1].set_ylabel(f"calibration error, last {WINDOW} groups")
        panels[1].set_ylim(bottom=0)
    ends = {row["phase"]: row["answered"] for row in rows}
    starts = [0, *ends.values()][:-1]
    for phase, start in zip(ends, starts, strict=True):
        panels[0].annotate(phase, (start + 0.5, 1.01), xycoords=("data", "axes fraction"), fontsize=8)
        for panel in panels:
            panel.axvline(start + 0.5, color="0.6", linestyle="--", linewidth=0.8)
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    panels[-1].set_xlabel("prompts answered")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
