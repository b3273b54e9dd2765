# SPDX-License-Identifier: Apache-2.0
"""The plots of ``benchmarks.gpu``: one line a way, over the batch size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def lines(rows: Sequence[dict[str, Any]], measure: str, draft: str | None, value: str) -> dict[str, Any]:
    """way → (batch sizes, values) of one plot; rows with an error are left out."""
    found = {}
    for row in rows:
        if row["measure"] == measure and row.get("draft") == draft and "rows" in row:
            found[row["way"]] = [r["batch"] for r in row["rows"]], [r[value] for r in row["rows"]]
    return found


def _plot(found: dict[str, Any], title: str, label: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for way, (batches, values) in found.items():
        axes.plot(batches, values, marker="o", label=way)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="batch size", ylabel=label, title=title)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def write(rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Write the plots of whatever was measured; returns their paths."""
    plots = []
    for draft in dict.fromkeys(row["draft"] for row in rows if "draft" in row):
        found = lines(rows, "draft_rounds", draft, "ms")
        plots.append((found, f"draft round, {draft} draft", "ms", folder / f"draft-rounds-{draft}.png"))
    found = lines(rows, "end_to_end", None, "tokens_per_second")
    plots.append((found, "70B-shaped fp8 target, 1B draft", "tokens/s", folder / "end-to-end.png"))
    written = []
    for found, title, label, path in plots:
        if found:
            _plot(found, title, label, path)
            written.append(path)
    return written
