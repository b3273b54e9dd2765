# SPDX-License-Identifier: Apache-2.0
"""Aggregate raw rows into the result rows (JSONL), a markdown table and a plot.

python -m benchmarks.serve.report benchmarks/results/X.raw.jsonl --out benchmarks/results/X.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.methods import NATIVE, OFF, parse_method
from benchmarks.common.records import RawFile
from benchmarks.common.stats import Cell, Spread, aggregate, complete_units


def method_order(raw: RawFile) -> list[str]:
    """Methods in the order of the command line of the last run."""
    if not raw.runs:
        raise ValueError(f"{raw.path} holds no run; measure first with python -m benchmarks.serve.run")
    return list(raw.runs[-1]["methods"])


def result_rows(
    cells: Sequence[Cell], runs: Sequence[dict[str, Any]], temperature: float, batch: int
) -> list[dict[str, Any]]:
    """One row a cell with the keys that every benchmark of this project uses."""
    last = runs[-1]
    commits = list(dict.fromkeys(run["git"] for run in runs))
    return [
        {
            "pair": last["settings"]["pair"],
            "set": cell.set,
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
            "git": "+".join(commits),
        }
        for cell in cells
    ]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def markdown(cells: Sequence[Cell], runs: Sequence[dict[str, Any]]) -> str:
    """The cells as one markdown table, with ratios and provenance."""
    last = runs[-1]
    settings = last["settings"]
    lines = [
        heading(last, f"temperature {settings['temperature']:g}", f"batch {settings['batch']}"),
        "Brackets: 95 % bootstrap interval over prompts; ratios are paired by prompt.",
        "",
        "| set | method | prompts | tokens/s | over off | over best fixed K | candidates | acceptance | equal to off |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        best = "" if cell.over_best_fixed_k is None else f"{spread(cell.over_best_fixed_k)} (K={cell.best_fixed_k})"
        equal = (
            "" if cell.equal_outputs is None or settings["temperature"] > 0 else f"{cell.equal_outputs}/{cell.units}"
        )
        length = "" if cell.mean_candidate_length is None else f"{cell.mean_candidate_length:.2f}"
        acceptance = "" if cell.acceptance is None else f"{100 * cell.acceptance:.1f} %"
        lines.append(
            f"| {cell.set} | {cell.method} | {cell.units * settings['batch']} | {spread(cell.tokens_per_second)} "
            f"| {spread(cell.over_off)} | {best} | {length} | {acceptance} | {equal} |"
        )
    return "\n".join([*lines, *origin(runs)])


def heading(run: dict[str, Any], temperature: str, batch: str) -> str:
    """The first line of a table: what was measured, and on what."""
    settings = run["settings"]
    parts = [f"Pair {settings['pair']}", temperature]
    # Older runs do not have these keys.
    if settings.get("top_k") is not None:
        parts.append(f"top-k {settings['top_k']}")
    if settings.get("draft_sample_method") is not None:
        parts.append(f"{settings['draft_sample_method']} drafting")
    compiled = "eager" if settings["eager"] else "compiled"
    parts += [batch, f"up to {settings['max_tokens']} new tokens", compiled]
    return f"{', '.join(filter(None, parts))}. {run['versions'].get('hardware', '')}."


def origin(runs: Sequence[dict[str, Any]]) -> list[str]:
    """The last lines of a table: command, versions, commits."""
    last = runs[-1]
    versions = ", ".join(f"{name} {value}" for name, value in last["versions"].items() if name != "hardware")
    commits = ", ".join(dict.fromkeys(run["git"] for run in runs))
    return ["", f"`{last['command']}`", "", f"{versions}; git {commits}", ""]


def spread(found: Spread | None) -> str:
    """A value with its interval; empty where there is none."""
    return "" if found is None else f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def plot(cells: Sequence[Cell], title: str, path: Path) -> None:
    """Bars of tokens/s, one group a set, with their intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sets = list(dict.fromkeys(cell.set for cell in cells))
    methods = list(dict.fromkeys(cell.method for cell in cells))
    width = 0.85 / len(methods)
    figure, axes = pyplot.subplots(figsize=(max(8.0, 0.28 * len(cells)), 4.5), layout="constrained")
    colours = _colours(methods, pyplot)
    for i, method in enumerate(methods):
        rates = [cell.tokens_per_second for cell in cells if cell.method == method]
        heights = [rate.value for rate in rates]
        errors = [[rate.value - rate.low for rate in rates], [rate.high - rate.value for rate in rates]]
        places = [place + (i - (len(methods) - 1) / 2) * width for place in range(len(sets))]
        axes.bar(places, heights, width, yerr=errors, label=method, color=colours[method], error_kw={"linewidth": 0.8})
    axes.set_xticks(range(len(sets)), sets)
    axes.set_ylabel("tokens per second")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _colours(methods: Sequence[str], pyplot: Any) -> dict[str, Any]:
    """Grey without speculation, blues for fixed K, warm colours for our rules."""
    native = [m for m in methods if parse_method(m).name == NATIVE]
    rules = [m for m in methods if parse_method(m).is_rule]
    colours: dict[str, Any] = {OFF: "0.6"}
    # The pale ends of the maps are hard to see on white.
    for names, scale, first, last in ((native, "Blues", 0.4, 0.9), (rules, "autumn", 0.0, 0.7)):
        for i, method in enumerate(names):
            colours[method] = pyplot.get_cmap(scale)(first + (last - first) * i / max(len(names) - 1, 1))
    return colours


def write_report(raw: RawFile, out: Path, force: bool = False) -> str:
    """Write ``out`` (JSONL), and beside it the table (.md) and the plot (.png); returns the table.

    Raises:
        ValueError: ``out`` exists and ``force`` is off, or no prompt is finished by all methods.
    """
    check_free(out, force)
    methods = method_order(raw)
    settings = raw.runs[-1]["settings"]
    if "temperature" not in settings:
        raise ValueError(f"{raw.path} holds several temperatures and batches; use python -m benchmarks.campaign.report")
    cells = aggregate(raw.rows, methods)
    table = markdown(cells, raw.runs)
    write_files(out, result_rows(cells, raw.runs, settings["temperature"], settings["batch"]), table)
    title = f"{settings['pair']}, T={settings['temperature']:g}, batch {settings['batch']}"
    plot(cells, title, out.with_suffix(".png"))
    partial = len({row["prompt"] for row in raw.rows}) - len(complete_units(raw.rows, methods))
    if partial:
        print(f"left out: {partial} prompt(s) that not every method has finished", file=sys.stderr)
    return table


def check_free(out: Path, force: bool) -> None:
    """ValueError where a report would be overwritten."""
    if out.exists() and not force:
        raise ValueError(f"--out {out} is there already; choose another name or pass --force to write it anew")


def write_files(out: Path, rows: Sequence[dict[str, Any]], table: str) -> None:
    """The result rows, and beside them the table."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out.with_suffix(".md").write_text(table, encoding="utf-8")


def report_command(
    module: str, summary: str, write: Callable[..., str], argv: list[str] | None, judged: bool = False
) -> int:
    """The command line of a report: raw rows in, what ``write`` makes of them out.

    Args:
        write: gets the raw file, the path to write, and whether it may be replaced.
        judged: it also takes the method that the ratios are of, or None.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=summary)
    parser.add_argument("raw", type=Path, help="X.raw.jsonl of a run, finished or not")
    parser.add_argument("--out", type=Path, required=True, help="X.jsonl; X.md and X.png are written beside it")
    parser.add_argument("--force", action="store_true", help="replace a report that is there already")
    if judged:
        parser.add_argument("--judged", help="the method that the ratios are of; by default the campaign's")
    args = parser.parse_args(argv)
    more = [args.judged] if judged else []
    try:
        if not args.raw.exists():
            raise ValueError(
                f"{args.raw} is missing; measure first with python -m benchmarks.serve.run or benchmarks.campaign"
            )
        print(write(RawFile(args.raw), args.out, args.force, *more))
    except ValueError as error:
        print(f"{module}: {error}", file=sys.stderr)
        return 2
    return 0


def main(argv: list[str] | None = None) -> int:
    """Command line: see the module's docstring."""
    return report_command("benchmarks.serve.report", (__doc__ or "").splitlines()[0], write_report, argv)


if __name__ == "__main__":
    sys.exit(main())
