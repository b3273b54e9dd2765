# SPDX-License-Identifier: Apache-2.0
"""What :mod:`benchmarks.simulate` found: lines on a terminal, result rows, a page and a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.provenance import git_state, versions

HEADER = (
    "costs      stream              off    best fixed     best threshold        informed    oracle  cost_aware  /best"
    "  2nd half  /fixed   /off  us/round"
)
RULES = ("fixed", "threshold", "informed")
"""The rules that know the costs."""
MARKS = {"fixed": ("_", "tab:blue"), "threshold": ("x", "tab:purple"), "informed": ("_", "0.3")}

COSTS = {
    "cpu": "the Qwen pair on two cores: first pass 40 ms, others 36 ms, verification as measured for each width",
    "one_core": "the Qwen pair compiled, on one core: draft passes 55 ms, verification 185 ms up to 6 tokens",
    "paper": "7B/70B on two A100: t_draft 23 ms, t_target 109 ms",
    "cheap": "t_draft 3.3 ms, t_target 109 ms: ratio 0.03",
    "dear": "t_draft 80 ms, t_target 109 ms",
    "b64": "compute-bound: verification 20 ms + 0.6 ms a token; draft passes 5 and 4 ms",
    "b64_cheap": "compute-bound: verification 8 ms + 0.4 ms a token; draft passes 2 and 1.5 ms",
}


def best(row: Mapping[str, Any]) -> float:
    """Tokens per second of the best rule that knows the costs; K = 0 is one of the fixed lengths."""
    return max(float(row[rule]) for rule in RULES)


def gap_closed(row: Mapping[str, Any]) -> str:
    """Share of the way from the best fixed K to the oracle; empty where the oracle is no better."""
    gap = row["oracle"] - row["fixed"]
    return f"{(row['cost_aware'] - row['fixed']) / gap:.0%}" if gap > 0.01 * row["fixed"] else ""


def line(row: Mapping[str, Any]) -> str:
    """One line under :data:`HEADER`."""
    mine, top = row["cost_aware"], best(row)
    return (
        f"{row['costs']:10s} {row['stream']:18s} {row['off']:7.2f} {row['fixed']:8.2f} (K={row['fixed_k']:2d})"
        f" {row['threshold']:8.2f} ({row['threshold_h']:14s}) {row['informed']:8.2f}  {row['oracle']:8.2f}"
        f"  {mine:8.2f}  {mine / top:6.3f}    {row['cost_aware_second_half'] / top:6.3f}  {mine / row['fixed']:6.3f}"
        f" {mine / row['off']:6.3f}  {row['rule_us_per_round']:8.0f}"
    )


def check_free(out: Path, force: bool) -> None:
    """ValueError where a file would be overwritten."""
    for path in (out, out.with_suffix(".md"), out.with_suffix(".png")):
        if path.exists() and not force:
            raise ValueError(f"specdecpp: --out {path} is there already; choose another name or pass --force")


def page(rows: Sequence[Mapping[str, Any]], command: str) -> str:
    """The rows as Markdown, with where they come from."""
    lines = [
        "Tokens/s, simulated. **/best**: over the best rule that knows the costs (best fixed K, best threshold",
        "or informed); **/fixed**: over the best fixed K of that very row, K = 0 among them; **/off**: over K = 0.",
        "**oracle** knows which candidates will be accepted; **gap**: share of the way from the best fixed K to it.",
        "Each prompt is a new request: what the rule knows of a request by its id, it learns anew for each prompt.",
        "",
        "| costs | batch | stream | off | best fixed K | best threshold | informed | oracle | cost_aware "
        "| /best | /fixed | /off | gap |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        mine = row["cost_aware"]
        lines.append(
            f"| {row['costs']} | {row['batch']} | {row['stream']} | {row['off']:.2f} "
            f"| {row['fixed']:.2f} (K={row['fixed_k']}) | {row['threshold']:.2f} ({row['threshold_h']}) "
            f"| {row['informed']:.2f} | {row['oracle']:.2f} | **{mine:.2f}** | {mine / best(row):.3f} "
            f"| {mine / row['fixed']:.3f} | {mine / row['off']:.3f} | {gap_closed(row)} |"
        )
    used = dict.fromkeys(row["costs"] for row in rows)
    lines += ["", *(f"* {name}: {COSTS[name]}" for name in used if name in COSTS)]
    if any(str(row["stream"]).startswith("recorded") for row in rows):
        lines += [
            "",
            "Recorded rounds end where the record does: no rule, however long its drafts, gets more candidates.",
        ]
    for name, divide in (("/best", best), ("/fixed", lambda r: r["fixed"]), ("/off", lambda r: r["off"])):
        ratios = [row["cost_aware"] / divide(row) for row in rows]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        lines += ["", f"{name}: geometric mean {mean:.3f}, least {min(ratios):.3f}."]
    known = ", ".join(f"{name} {version}" for name, version in versions().items())
    return "\n".join([*lines, "", f"`{command}`", "", f"{known}; git {git_state()}", ""])


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Speed-up over K = 0 of each rule, one panel for each costs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    costs = list(dict.fromkeys(row["costs"] for row in rows))
    columns = min(4, len(costs))
    shape = math.ceil(len(costs) / columns), columns
    figure, panels = pyplot.subplots(
        *shape, figsize=(3.3 * columns, 3.0 * shape[0]), layout="constrained", squeeze=False
    )
    for panel in panels.flat[len(costs) :]:
        panel.axis("off")
    for name, panel in zip(costs, panels.flat, strict=False):
        cells = [row for row in rows if row["costs"] == name]
        places = range(len(cells))
        panel.bar(places, [r["cost_aware"] / r["off"] for r in cells], 0.6, color="tab:orange", label="cost_aware")
        for rule, (mark, colour) in MARKS.items():
            heights = [r[rule] / r["off"] for r in cells]
            size = 14 if mark == "_" else 6
            panel.plot(places, heights, mark, color=colour, markersize=size, markeredgewidth=2, label=rule)
        panel.axhline(1.0, color="0.6", linewidth=0.8)
        panel.set_xticks(places, [r["stream"].removeprefix("recorded:") for r in cells], rotation=30, ha="right")
        panel.set_title(f"{name}, batch {cells[0]['batch']}", fontsize=9)
        panel.tick_params(labelsize=7)
    panels[0, 0].set_ylabel("speed-up over K = 0")
    panels[0, 0].legend(fontsize=6)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def write(rows: Sequence[Mapping[str, Any]], out: Path, command: str) -> None:
    """``out`` (JSONL), and beside it the page (.md) and the plot (.png)."""
    origin = {"command": command, "versions": versions(), "git": git_state()}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps({**row, **origin}) + "\n" for row in rows), encoding="utf-8")
    out.with_suffix(".md").write_text(page(rows, command), encoding="utf-8")
    plot(rows, out.with_suffix(".png"))
