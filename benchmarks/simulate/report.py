# SPDX-License-Identifier: Apache-2.0
"""What :mod:`benchmarks.simulate.play` found: lines on a terminal, result rows, a page and plots."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.provenance import git_state, versions
from benchmarks.simulate.settings import SLOW

Row = Mapping[str, Any]
HEADER = (
    "costs      stream             start        off     fixed       threshold            informed   chosen   oracle"
    "  cost_aware  /best   /off  first  worst  after  tried  1st  us/round"
)
MIX_HEADER = "costs      stream             start     load     TTFT /off    TPOT /off  candidates a token"
RULES = ("off", "fixed", "threshold", "informed")
"""The rules that know the costs."""
LOSSES = {"loss_first": "first tokens", "loss_worst": "worst window", "loss_after": "afterwards"}
LEAST_LOSS = -10.0
"""Per cent; what is below is not shown."""
MARKS = {"fixed": ("_", "tab:blue"), "threshold": ("x", "tab:purple"), "informed": ("_", "0.3")}

COSTS = {
    "cpu": "the Qwen pair on two cores: first pass 40 ms, others 36 ms, verification as measured for each width",
    "cpu_int8": "the Qwen pair in int8: first pass 44 ms, others 40 ms, verification 91 ms to 289 ms for 11 tokens",
    "one_core": "the Qwen pair compiled, on one core: draft passes 55 ms, verification 185 ms up to 6 tokens",
    "paper": "7B/70B on two A100: t_draft 23 ms, t_target 109 ms",
    "cheap": "t_draft 3.3 ms, t_target 109 ms: ratio 0.03",
    "dear": "t_draft 80 ms, t_target 109 ms",
    "b64": "compute-bound: verification 20 ms + 0.6 ms a token; draft passes 5 and 4 ms",
    "b64_cheap": "compute-bound: verification 8 ms + 0.4 ms a token; draft passes 2 and 1.5 ms",
}


def best(row: Row) -> float:
    """Tokens per second of the best rule that knows the costs."""
    return max(float(row[rule]) for rule in RULES)


def gap_closed(row: Row) -> str:
    """Share of the way from the best fixed K to the oracle; empty where the oracle is no better."""
    gap = row["oracle"] - row["fixed"]
    return f"{(row['cost_aware'] - row['fixed']) / gap:.0%}" if gap > 0.01 * row["fixed"] else ""


def line(row: Row) -> str:
    """One line under the header."""
    start = f"{row['costs']:10s} {row['stream']:18s} {row['start']:8s}"
    if "load" in row:
        return (
            f"{start}  {row['load']:4.2f}  {row['ttft']:7.2f} {row['ttft'] / row['off_ttft']:5.3f}"
            f"  {row['tpot']:6.3f} {row['tpot'] / row['off_tpot']:5.3f}  {row['candidates_per_token']:6.3f}"
        )
    mine = row["cost_aware"]
    first = "-" if row["first_draft"] is None else f"{row['first_draft']:.0f}"
    return (
        f"{start} {row['off']:7.2f} {row['fixed']:7.2f} (K={row['fixed_k']:2d})"
        f" {row['threshold']:7.2f} ({row['threshold_h']:14s}) {row['informed']:7.2f}  {row['chosen']:7.2f}"
        f"  {row['oracle']:7.2f}    {mine:7.2f}  {mine / best(row):6.3f} {mine / row['off']:6.3f}"
        f" {row['loss_first']:6.1%} {row['loss_worst']:6.1%} {row['loss_after']:6.1%} {row['tried']:6.2%}"
        f" {first:>4s} {row['rule_us_per_round']:6.0f}"
    )


def check_free(out: Path, force: bool) -> None:
    """ValueError where a file would be overwritten."""
    for path in (out, out.with_suffix(".md"), out.with_suffix(".png")):
        if path.exists() and not force:
            raise ValueError(f"specdecpp: --out {path} is there already; choose another name or pass --force")


def summary(rows: Sequence[Row]) -> list[str]:
    """What the rows say together, for each start."""
    out = []
    for start in dict.fromkeys(row["start"] for row in rows):
        mine = [row for row in rows if row["start"] == start]
        if "load" in mine[0]:
            for name in ("ttft", "tpot"):
                ratios = [row[name] / row[f"off_{name}"] for row in mine]
                out.append(f"{start}, {name.upper()} over off: {_spread(mine, ratios)}.")
            continue
        for name in ("best", "fixed", "off"):
            ratios = [row["cost_aware"] / (best(row) if name == "best" else row[name]) for row in mine]
            out.append(f"{start}, /{name}: {_spread(mine, ratios)}.")
        for name, what in LOSSES.items():
            loss, cell = max((row[name], f"{row['costs']} {row['stream']}") for row in mine)
            out.append(f"{start}, most lost, {what}: {loss:.1%} ({cell}).")
    return out


def _spread(rows: Sequence[Row], ratios: Sequence[float]) -> str:
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    named = [(ratio, f"{row['costs']} {row['stream']}") for row, ratio in zip(rows, ratios, strict=True)]
    (least, low), (most, high) = min(named), max(named)
    return f"geometric mean {mean:.3f}, least {least:.3f} ({low}), greatest {most:.3f} ({high})"


def page(rows: Sequence[Row], command: str) -> str:
    """The rows as Markdown, with where they come from."""
    lines = _mix_table(rows) if "load" in rows[0] else _table(rows)
    used = dict.fromkeys(row["costs"] for row in rows)
    lines += ["", *(f"* {name}: {COSTS[name]}" for name in used if name in COSTS)]
    if "slow" in rows[0]:
        share = f"{rows[0]['slow']:.0%}"
        lines += ["", f"Of the widths that start-up timed {share} were timed in a slow moment: {SLOW} times too dear."]
    if any(str(row["stream"]).startswith("recorded") for row in rows):
        lines += ["", "Where a recorded round was accepted to its end, the next candidate is a guess: accepted as"]
        lines += ["often as the others of that request."]
    for text in summary(rows):
        lines += ["", text]
    known = ", ".join(f"{name} {version}" for name, version in versions().items())
    return "\n".join([*lines, "", f"`{command}`", "", f"{known}; git {git_state()}", ""])


def _table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "Tokens/s, simulated. **/best**: over the best rule that knows the costs (off, best fixed K, best threshold",
        "or informed); **/fixed**: over the best fixed K of that very row, K = 0 among them; **/off**: over K = 0.",
        "**oracle** knows which candidates will be accepted; **gap**: share of the way from the best fixed K to it.",
        "**chosen**: informed, requests drafted for or not in hindsight (batch 1). Lost, against the better of off and",
        "informed: over the **first** 2,000 tokens, in the **worst** 500, and **after** the first 2,000 (a batch: 128",
        "and 32 rounds at least); **tried**: afterwards, in rounds that were a trial. **1st**: rounds before a draft.",
        "",
        "| costs | batch | stream | start | off | best fixed K | best threshold | informed | chosen | oracle "
        "| cost_aware | /best | /fixed | /off | gap | first | worst | after | tried | 1st |",
        "|---" * 20 + "|",
    ]
    for row in rows:
        mine = row["cost_aware"]
        first = "never" if row["first_draft"] is None else f"{row['first_draft']:.0f}"
        lines.append(
            f"| {row['costs']} | {row['batch']} | {row['stream']} | {row['start']} | {row['off']:.2f} "
            f"| {row['fixed']:.2f} (K={row['fixed_k']}) | {row['threshold']:.2f} ({row['threshold_h']}) "
            f"| {row['informed']:.2f} | {row['chosen']:.2f} | {row['oracle']:.2f} | **{mine:.2f}** "
            f"| {mine / best(row):.3f} | {mine / row['fixed']:.3f} | {mine / row['off']:.3f} | {gap_closed(row)} "
            f"| {row['loss_first']:.1%} | {row['loss_worst']:.1%} | {row['loss_after']:.1%} | {row['tried']:.2%} "
            f"| {first} |"
        )
    return lines


def _mix_table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "Poisson arrivals, simulated; **load**: as a share of what the engine can serve without drafting. TTFT: median",
        "seconds to the first token; TPOT: seconds a token after it, of requests begun after the first 200 tokens.",
        "",
        "| costs | batch | stream | start | load | TTFT | over off | TPOT | over off | candidates a token |",
        "|---" * 10 + "|",
    ]
    for row in rows:
        lines.append(
            f"| {row['costs']} | {row['batch']} | {row['stream']} | {row['start']} | {row['load']:.2f} "
            f"| {row['ttft']:.2f} | {row['ttft'] / row['off_ttft']:.3f} "
            f"| {row['tpot']:.4f} | {row['tpot'] / row['off_tpot']:.3f} | {row['candidates_per_token']:.2f} |"
        )
    return lines


def plot(rows: Sequence[Row], path: Path) -> None:
    """Above, what was lost over the tokens, below the speed-up over K = 0; one column for each costs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    costs = list(dict.fromkeys(row["costs"] for row in rows))
    streams = list(dict.fromkeys(row["stream"] for row in rows))
    shape = 2, len(costs)
    figure, panels = pyplot.subplots(*shape, figsize=(3.3 * len(costs), 6.0), layout="constrained", squeeze=False)
    for name, (above, below) in zip(costs, panels.T, strict=True):
        cells = [row for row in rows if row["costs"] == name]
        for row in cells:
            colour = f"C{streams.index(row['stream'])}"
            style = {"cold": "-", "warm": "--", "restored": ":"}[row["start"]]
            label = f"{row['stream']}, {row['start']}".removeprefix("recorded:")
            above.plot(row["curve"][0], [100 * y for y in row["curve"][1]], style, color=colour, label=label)
        above.axhline(0.0, color="0.6", linewidth=0.8)
        above.axhline(3.0, color="tab:red", linewidth=0.8)
        above.set_title(f"{name}, batch {cells[0]['batch']}", fontsize=9)
        above.set_xlabel("tokens", fontsize=7)
        places = range(len(cells))
        below.bar(places, [r["cost_aware"] / r["off"] for r in cells], 0.6, color="tab:orange", label="cost_aware")
        for rule, (mark, colour) in MARKS.items():
            size = 14 if mark == "_" else 6
            heights = [r[rule] / r["off"] for r in cells]
            below.plot(places, heights, mark, color=colour, markersize=size, markeredgewidth=2, label=rule)
        below.axhline(1.0, color="0.6", linewidth=0.8)
        names = [f"{r['stream']} {r['start']}".removeprefix("recorded:") for r in cells]
        below.set_xticks(places, names, rotation=60, ha="right")
        above.set_ylim(bottom=max(above.get_ylim()[0], LEAST_LOSS))  # a batch's first tokens are a round or two
        for panel in (above, below):
            panel.tick_params(labelsize=7)
    panels[0, 0].set_ylabel("lost so far, %")
    panels[1, 0].set_ylabel("speed-up over K = 0")
    for panel in panels[:, 0]:
        panel.legend(fontsize=6)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write(rows: Sequence[Row], out: Path, command: str, plots: bool = True) -> None:
    """``out`` (JSONL), and beside it the page (.md) and, with ``plots``, the plots (.png)."""
    origin = {"command": command, "versions": versions(), "git": git_state()}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps({**row, **origin}) + "\n" for row in rows), encoding="utf-8")
    out.with_suffix(".md").write_text(page(rows, command), encoding="utf-8")
    if plots and "load" not in rows[0]:
        plot(rows, out.with_suffix(".png"))
