# SPDX-License-Identifier: Apache-2.0
"""Tables, result rows (JSONL) and heat maps (PNG) of the cells that benchmarks.campaign has measured.

python -m benchmarks.campaign.report benchmarks/results/X.raw.jsonl --out benchmarks/results/X.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.common.methods import NATIVE, OFF, parse_method
from benchmarks.common.provenance import origin
from benchmarks.common.records import RawFile, Row, write_files
from benchmarks.common.stats import ALL, Cell, Spread, aggregate, best_fixed_k, complete_units

Place = tuple[float, str, int]
"""Temperature, set, batch."""
Cells = dict[Place, dict[str, Cell]]
"""The methods' cells of each place."""


def cells_of(
    rows: Sequence[Row], methods_by_cell: Mapping[str, Sequence[str]], families: Mapping[str, Sequence[str]]
) -> Cells:
    """Every place that has a group finished by all its methods, sorted by temperature, set (as measured) and batch.

    Args:
        methods_by_cell: labels by temperature and batch (``Campaign.methods_by_cell``).
        families: sets by the name of the total that they belong to.

    Raises:
        ValueError: there is none.
    """
    cells: Cells = {}
    names = [*dict.fromkeys(row["set"] for row in rows), *families, ALL]
    for temperature, batch in sorted({(row["temperature"], row["batch"]) for row in rows}):
        chosen = [row for row in rows if (row["temperature"], row["batch"]) == (temperature, batch)]
        methods = methods_by_cell.get(f"{temperature:g}/{batch}", [])
        each: list[tuple[str | None, Sequence[str]]] = [(None, names), *families.items()]
        for name, sets in each:
            mine = [row for row in chosen if row["set"] in sets]
            if complete_units(mine, methods):
                for cell in aggregate(mine, methods):
                    if name is None:
                        cells.setdefault((temperature, cell.set, batch), {})[cell.method] = cell
                    elif cell.set == ALL:
                        cells.setdefault((temperature, name, batch), {})[cell.method] = replace(cell, set=name)
    if not cells:
        raise ValueError("no group was finished by every method yet: nothing to report")
    return dict(sorted(cells.items(), key=lambda item: (item[0][0], names.index(item[0][1]), item[0][2])))


def summary(cells: Cells, judged: str, totals: Sequence[str]) -> Row:
    """The figures that the aims are set in; geometric means over the places, without the totals."""
    places = [of[judged] for place, of in cells.items() if place[1] not in totals]
    result: Row = {"method": judged, "cells": len(places)}
    for name in ("over_off", "over_rival"):
        ratios = [ratio for ratio in (getattr(cell, name) for cell in places) if ratio is not None]
        values = np.array([ratio.value for ratio in ratios])
        result[f"{name}_geometric_mean"] = round(float(np.exp(np.log(values).mean())), 4)
        result[f"{name}_lowest"] = round(float(values.min()), 4)
        several = [getattr(cell, name) for cell in places if cell.units > 1]  # a group alone has no interval
        result[f"{name}_surely_below_0.98"] = sum(ratio is not None and ratio.high < 0.98 for ratio in several)
    return result


def result_rows(cells: Cells, runs: Sequence[Row]) -> list[Row]:
    """A row a place and method, with the keys that every benchmark of this project uses."""
    last, commits = runs[-1], "+".join(dict.fromkeys(run["git"] for run in runs))
    return [
        {
            "pair": last["settings"]["pair"],
            "set": name,
            "temperature": temperature,
            "batch": batch,
            "method": cell.method,
            "tokens_per_second": round(cell.tokens_per_second.value, 4),
            "low": round(cell.tokens_per_second.low, 4),
            "high": round(cell.tokens_per_second.high, 4),
            "mean_candidate_length": _rounded(cell.mean_candidate_length),
            "acceptance": _rounded(cell.acceptance),
            "command": last["command"],
            "versions": last["versions"],
            "git": commits,
        }
        for (temperature, name, batch), of in cells.items()
        for cell in of.values()
    ]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def markdown(cells: Cells, runs: Sequence[Row], judged: str) -> str:
    """One table over all sets, a row a temperature and batch; one with every set; of a single temperature and batch
    also one of all methods."""
    last, totals = runs[-1], (*runs[-1]["families"], ALL)
    settings = last["settings"]
    parts = [f"Pair {settings['pair']}"]
    parts += [f"top-k {settings['top_k']}"] if settings["top_k"] is not None else []
    parts += [f"{settings['draft_sample_method']} drafting"] if settings["draft_sample_method"] is not None else []
    parts += [f"up to {settings['max_tokens']} new tokens", "eager" if settings["eager"] else "compiled"]
    lines = [
        f"{', '.join(parts)}. {last['versions'].get('hardware', '')}.",
        f"Tokens/s; ratios of {judged}, paired by group of prompts, with 95 % bootstrap intervals. The best fixed K",
        "and the best of vLLM's own methods (off, draft_model, ngram, suffix) are the fastest of that very cell.",
        "",
        *front({place: of for place, of in cells.items() if place[1] in totals}, judged),
        "",
        *table({place: of for place, of in cells.items() if place[1] in totals}, judged),
        "",
        *table({place: of for place, of in cells.items() if place[1] not in totals}, judged),
    ]
    if len({(temperature, batch) for temperature, _, batch in cells}) == 1:
        lines += ["", *methods_table(cells)]
    return "\n".join([*lines, *origin(runs)])


def front(cells: Cells, judged: str) -> list[str]:
    """Lines of the short table that README repeats (``tests/unit/test_results.py``), a row a place."""
    rows = [
        "| T | batch | text | off | vLLM's best | specdecpp | over off | over vLLM's best |",
        "|---" * 8 + "|",
    ]
    for (temperature, name, batch), of in cells.items():
        ours = of[judged]
        own, best = ours.tokens_per_second.value, of[ours.rival].tokens_per_second.value if ours.rival else 0.0
        rival = f"{_bold(best, best > own)} ({ours.rival})" if ours.rival else ""
        rows.append(
            f"| {temperature:g} | {batch} | {name} | {of[OFF].tokens_per_second.value:.2f} | {rival} "
            f"| {_bold(own, own >= best)} | {_shown(ours.over_off, ours.units)} "
            f"| {_shown(ours.over_rival, ours.units)} |"
        )
    return rows


def _bold(rate: float, is_faster: bool) -> str:
    return f"**{rate:.2f}**" if is_faster else f"{rate:.2f}"


def table(cells: Cells, judged: str) -> list[str]:
    """Lines of a markdown table, a row a place."""
    labels = list(dict.fromkeys(label for of in cells.values() for label in of))
    shown = [label for label in labels if parse_method(label).name not in (OFF, NATIVE)]
    rows = [
        f"| T | set | batch | groups | off | best fixed K | {' | '.join(shown)} | over off | over vLLM's best |",
        "|---" * (8 + len(shown)) + "|",
    ]
    for (temperature, name, batch), of in cells.items():
        ours, best = of[judged], best_fixed_k(list(of.values()))
        fixed = f"{best.tokens_per_second.value:.2f} (K={ours.best_fixed_k})" if best else ""
        rates = " | ".join(f"{of[label].tokens_per_second.value:.2f}" if label in of else "" for label in shown)
        rows.append(
            f"| {temperature:g} | {name} | {batch} | {ours.units} | {of[OFF].tokens_per_second.value:.2f} | {fixed} "
            f"| {rates} | {_shown(ours.over_off, ours.units)} | {_shown(ours.over_rival, ours.units)} ({ours.rival}) |"
        )
    return rows


def methods_table(cells: Cells) -> list[str]:
    """Lines of a markdown table, a row a set and method: what it drafted, and how many outputs are those of off."""
    rows = [
        "| set | method | groups | tokens/s | over off | over best fixed K | candidates | acceptance | equal to off |",
        "|---" * 9 + "|",
    ]
    for (temperature, name, _), of in cells.items():
        for cell in of.values():
            fixed = cell.over_best_fixed_k and f"{_shown(cell.over_best_fixed_k, cell.units)} (K={cell.best_fixed_k})"
            equal = None if cell.equal_outputs is None or temperature > 0 else f"{cell.equal_outputs}/{cell.units}"
            length = None if cell.mean_candidate_length is None else f"{cell.mean_candidate_length:.2f}"
            acceptance = None if cell.acceptance is None else f"{100 * cell.acceptance:.1f} %"
            rows.append(
                f"| {name} | {cell.method} | {cell.units} | {_shown(cell.tokens_per_second, cell.units)} "
                f"| {_shown(cell.over_off, cell.units)} | {fixed or ''} | {length or ''} | {acceptance or ''} "
                f"| {equal or ''} |"
            )
    return rows


def _shown(found: Spread | None, num_groups: int) -> str:
    """A value with its interval; one group has none."""
    if found is None:
        return ""
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]" if num_groups > 1 else f"{found.value:.2f}"


def plot(cells: Cells, judged: str, totals: Sequence[str], title: str, path: Path) -> None:
    """Two heat maps: over the best of vLLM's own methods, and over off; rows set and T, columns batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import colors, pyplot

    rows = list(dict.fromkeys((t, name) for t, name, _ in cells if name not in totals))
    batches = sorted({batch for _, _, batch in cells})
    panels = {"over the best of vLLM's own methods": "over_rival", "over off": "over_off"}
    figure, axes = pyplot.subplots(
        1, 2, figsize=(4 + 1.3 * len(batches), 1.6 + 0.45 * len(rows)), sharey=True, layout="constrained"
    )
    for panel, (name, ratio) in zip(axes, panels.items(), strict=True):
        values = np.full((len(rows), len(batches)), np.nan)  # [num_rows, num_batches]
        for (temperature, in_set, batch), methods in cells.items():
            found = getattr(methods[judged], ratio)
            if in_set not in totals and found is not None:
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


def write_report(raw: RawFile, out: Path, force: bool = False, judged: str | None = None) -> str:
    """Write ``out`` (JSONL), and beside it the table (.md) and the heat maps (.png); returns table and summary.

    Args:
        judged: the method that the ratios are of; None: the campaign's.

    Raises:
        ValueError: ``out`` exists and ``force`` is off, no group is finished by all methods, or ``judged`` is not in
            every cell.
    """
    if out.exists() and not force:
        raise ValueError(f"--out {out} is there already; choose another name or pass --force to write it anew")
    if not raw.runs:
        raise ValueError(f"{raw.path} holds no run: measure first with python -m benchmarks.campaign")
    last = raw.runs[-1]
    if "cells" not in last:
        raise ValueError(f"{raw.path} is no campaign's: the commit that it names has its program")
    cells = cells_of(raw.rows, last["cells"], last["families"])
    judged, totals = judged or last["judged"], (*last["families"], ALL)
    if not all(judged in of for of in cells.values()):
        raise ValueError(f"--judged {judged}: not measured in every cell")
    written = markdown(cells, raw.runs, judged)
    write_files(out, result_rows(cells, raw.runs), written)
    plot(cells, judged, totals, f"{judged}, tokens/s: {last['settings']['pair']}", out.with_suffix(".png"))
    return f"{written}\n{json.dumps(summary(cells, judged, totals))}"


def main(argv: list[str] | None = None) -> int:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.campaign.report", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("raw", type=Path, help="X.raw.jsonl of a campaign, finished or not")
    parser.add_argument("--out", type=Path, required=True, help="X.jsonl; X.md and X.png are written beside it")
    parser.add_argument("--force", action="store_true", help="replace a report that is there already")
    parser.add_argument("--judged", help="the method that the ratios are of; by default the campaign's")
    args = parser.parse_args(argv)
    try:
        print(write_report(RawFile(args.raw), args.out, args.force, args.judged))
    except ValueError as error:
        print(f"{parser.prog.removeprefix('python -m ')}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
