# SPDX-License-Identifier: Apache-2.0
"""The plots of ``benchmarks.gpu``: a line a way, over the batch size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def lines(rows: Sequence[dict[str, Any]], draft: str) -> dict[str, Any]:
    """way → (batch sizes, milliseconds) of one draft's rounds; rows with an error are left out."""
    return {
        row["way"]: ([r["batch"] for r in row["rows"]], [r["ms"] for r in row["rows"]])
        for row in rows
        if row["draft"] == draft and "rows" in row
    }


def _plot(found: dict[str, Any], draft: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for way, (batches, values) in found.items():
        axes.plot(batches, values, marker="o", label=way)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="batch size", ylabel="ms", title=f"draft round, {draft} draft")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def write(rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Write a plot for each draft that was measured; returns their paths."""
    written = []
    for draft in dict.fromkeys(row["draft"] for row in rows):
        if found := lines(rows, draft):
            written.append(folder / f"draft-rounds-{draft}.png")
            _plot(found, draft, written[-1])
    return written
