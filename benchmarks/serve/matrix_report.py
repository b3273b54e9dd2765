# SPDX-License-Identifier: Apache-2.0
"""One table, result rows (JSONL) and heat maps (PNG) of the cells that benchmarks.serve.matrix has measured.

python -m benchmarks.serve.matrix_report benchmarks/results/X.raw.jsonl --out benchmarks/results/X.jsonl
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.methods import OFF, parse_method
from benchmarks.common.records import RawFile, Row
from benchmarks.common.stats import ALL, Cell, Spread, aggregate, best_fixed_k, complete_units
from benchmarks.serve.report import (
    check_free,
    heading,
    method_order,
    origin,
    report_command,
    result_rows,
    spread,
    write_files,
)

Place = tuple[float, str, int]
"""Temperature, set, batch."""
Cells = dict[Place, dict[str, Cell]]
"""The methods' cells of each place."""


def cells_of(rows: Sequence[Row], methods: Sequence[str]) -> Cells:
    """Every place that has a group finished by all methods, sorted by temperature, set (as measured) and batch.

    Raises:
        ValueError: there is none.
    """
    cells: Cells = {}
    sets = [*dict.fromkeys(row["set"] for row in rows), ALL]
    for temperature, batch in sorted({(row["temperature"], row["batch"]) for row in rows}):
        chosen = [row for row in rows if (row["temperature"], row["batch"]) == (temperature, batch)]
        if complete_units(chosen, methods):
            for cell in aggregate(chosen, methods):
                cells.setdefault((temperature, cell.set, batch), {})[cell.method] = cell
    if not cells:
        raise ValueError("no group was finished by every method yet: nothing to report")
    return dict(sorted(cells.items(), key=lambda item: (item[0][0], sets.index(item[0][1]), item[0][2])))


def over_better(cell: Cell) -> Spread | None:
    """The ratio over the better of the best fixed K and off, which is the smaller ratio."""
    found = [ratio for ratio in (cell.over_off, cell.over_best_fixed_k) if ratio is not None]
    return min(found, key=lambda ratio: ratio.value, default=None)


def summary(cells: Cells, judged: str) -> Row:
    """The figures that the aims are set in; geometric means over the places, without the sets' totals."""
    places = {place: of[judged] for place, of in cells.items() if place[1] != ALL}
    over = {
        "over_off": [cell.over_off for cell in places.values()],
        "over_better": [over_better(cell) for cell in places.values()],
        "over_best_fixed_k_batch_1": [cell.over_best_fixed_k for (_, _, b), cell in places.items() if b == 1],
    }
    result: Row = {"method": judged, "cells": len(places)}
    for name, spreads in over.items():
        values = np.array([ratio.value for ratio in spreads if ratio is not None])
        if len(values):
            result[f"{name}_geometric_mean"] = round(float(np.exp(np.log(values).mean())), 4)
            result[f"{name}_lowest"] = round(float(values.min()), 4)
    return result


def markdown(cells: Cells, runs: Sequence[dict[str, Any]], judged: str) -> str:
    """One row a place."""
    last = runs[-1]
    rules = [label for label in last["methods"] if parse_method(label).is_rule]
    temperatures = ", ".join(f"{t:g}" for t in dict.fromkeys(t for t, _, _ in cells))
    batches = ", ".join(str(b) for b in sorted({b for _, _, b in cells}))
    lines = [
        heading(last, f"temperature {temperatures}", f"batch {batches}"),
        f"Tokens/s; ratios of {judged}, paired by group of prompts, with 95 % bootstrap intervals. The best fixed K is "
        "the fastest of that very cell.",
        "",
        f"| T | set | batch | groups | off | best fixed K | {' | '.join(rules)} | over off | over best fixed K |",
        "|---" * (8 + len(rules)) + "|",
    ]
    for (temperature, name, batch), methods in cells.items():
        ours, best = methods[judged], best_fixed_k(list(methods.values()))
        fixed = f"{best.tokens_per_second.value:.2f} (K={ours.best_fixed_k})" if best else ""
        rates = " | ".join(f"{methods[rule].tokens_per_second.value:.2f}" for rule in rules)
        off = f"{methods[OFF].tokens_per_second.value:.2f}"
        lines.append(
            f"| {temperature:g} | {name} | {batch} | {ours.units} | {off} | {fixed} | {rates} "
            f"| {_shown(ours.over_off, ours.units)} | {_shown(ours.over_best_fixed_k, ours.units)} |"
        )
    return "\n".join([*lines, *origin(runs)])


def _shown(ratio: Spread | None, num_groups: int) -> str:
    """A ratio with its interval; one group has none."""
    return spread(ratio) if ratio is None or num_groups > 1 else f"{ratio.value:.2f}"


def plot(cells: Cells, judged: str, title: str, path: Path) -> None:
    """Two heat maps: over the better of best fixed K and off, and over off; rows set and T, columns batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import colors, pyplot

    rows = list(dict.fromkeys((t, name) for t, name, _ in cells if name != ALL))
    batches = sorted({batch for _, _, batch in cells})
    panels = {"over the better of best fixed K and off": over_better, "over off": lambda cell: cell.over_off}
    figure, axes = pyplot.subplots(
        1, 2, figsize=(4 + 1.3 * len(batches), 1.6 + 0.45 * len(rows)), sharey=True, layout="constrained"
    )
    for panel, (name, ratio_of) in zip(axes, panels.items(), strict=True):
        values = np.full((len(rows), len(batches)), np.nan)  # [num_rows, num_batches]
        for (temperature, in_set, batch), methods in cells.items():
            found = ratio_of(methods[judged])
            if in_set != ALL and found is not None:
                values[rows.index((temperature, in_set)), batches.index(batch)] = found.value
        # The same colour for the same factor up and down; white is no difference.
        reach = max(0.05, float(np.nanmax(np.abs(np.log(values)), initial=0.0)))
        scale = colors.TwoSlopeNorm(0.0, -reach, reach)
        panel.imshow(np.ma.masked_invalid(np.log(values)), cmap="RdBu", norm=scale, aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            shown = "" if np.isnan(value) else f"{value:.2f}"
            dark = not np.isnan(value) and abs(np.log(value)) > 0.6 * reach
            panel.text(j, i, shown, ha="center", va="center", fontsize=8, color="white" if dark else "black")
        panel.set_xticks(range(len(batches)), [str(batch) for batch in batches])
        panel.set_xlabel("batch")
        panel.set_title(name, fontsize=9)
    axes[0].set_yticks(range(len(rows)), [f"{name}, T={temperature:g}" for temperature, name in rows])
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def write_report(raw: RawFile, out: Path, force: bool = False) -> str:
    """Write ``out`` (JSONL), and beside it the table (.md) and the heat maps (.png); returns table and summary.

    Raises:
        ValueError: ``out`` exists and ``force`` is off, or no group is finished by all methods.
    """
    check_free(out, force)
    methods = method_order(raw)
    if "judged" not in raw.runs[-1]:
        raise ValueError(f"{raw.path} holds one temperature and batch; use python -m benchmarks.serve.report")
    judged = raw.runs[-1]["judged"]
    cells = cells_of(raw.rows, methods)
    table = markdown(cells, raw.runs, judged)
    rows: list[Row] = []
    for (temperature, _, batch), of in cells.items():
        rows += result_rows(list(of.values()), raw.runs, temperature, batch)
    write_files(out, rows, table)
    pair = raw.runs[-1]["settings"]["pair"]
    plot(cells, judged, f"{judged}, tokens/s: {pair}", out.with_suffix(".png"))
    return f"{table}\n{json.dumps(summary(cells, judged))}"


def main(argv: list[str] | None = None) -> int:
    """Command line: see the module's docstring."""
    return report_command("benchmarks.serve.matrix_report", (__doc__ or "").splitlines()[0], write_report, argv)


if __name__ == "__main__":
    sys.exit(main())
