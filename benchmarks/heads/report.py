# SPDX-License-Identifier: Apache-2.0
"""What :mod:`benchmarks.heads.sweep` found: a row a configuration and set, a page and a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.records import RawFile
from vllm_specdecpp.files import write_whole

Row = dict[str, Any]
ESTIMATORS = {
    "head": "head",
    "head_uncalibrated": "head before calibration",
    "logit_features": "logit features",
    "confidence_calibrated": "top-1 probability, calibrated",
    "confidence": "top-1 probability",
    "entropy_calibrated": "entropy, calibrated",
}
FIGURES = ("auc", "log_loss", "ece")
OVER = ("auc_over_logit_features", "log_loss_over_logit_features")
NOTES = ("<!-- notes -->", "<!-- /notes -->")
"""What stands between these lines of a page is written by hand, and kept when the page is written anew."""


def check_paths(out: Path, force: bool) -> Path:
    """Path of the raw rows; ValueError where a report would be overwritten."""
    if out.suffix != ".jsonl" or out.name.endswith(".raw.jsonl"):
        raise ValueError(f"--out {out}: the name must end in .jsonl (and not in .raw.jsonl)")
    if out.exists() and not force:
        raise ValueError(f"--out {out} is finished; choose another name, or pass --force to measure what is missing")
    return out.with_suffix(".raw.jsonl")


def everything(row: Mapping[str, Any]) -> str:
    """Name of the set of all rows, which is the only one where there is but one set."""
    return "all" if "all" in row["sets"] else str(next(iter(row["sets"])))


def summary(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """A row a configuration and set: each figure's mean over the seeds, lowest and highest (``_low``, ``_high``).

    Of all sets together also the distances from the logit features, with the mean ends of their 95 % intervals over
    prompts (``_prompts``).
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    # Factors in the order of their first run; what was added to one later stands beside its like.
    factors = list(dict.fromkeys(row["factor"] for row in rows))
    for row in sorted(rows, key=lambda row: factors.index(row["factor"])):
        groups.setdefault((row["factor"], row["value"]), []).append(row)
    found = []
    for (factor, value), members in groups.items():
        first = members[0]
        for name in first["sets"]:
            line: Row = {"factor": factor, "value": value, "set": name, "seeds": len(members)}
            line |= {key: first[key] for key in ("lag", "changes", "num_parameters")}
            line["rows"] = round(_mean([member["rows"] for member in members]))
            line["epochs"] = round(_mean([member["best_epoch"] for member in members]), 1)
            line["seconds"] = round(_mean([member["seconds"] for member in members]), 1)
            line |= {key: first["sets"][name][key] for key in ("num", "prompts", "accept_rate")}
            for estimator in ESTIMATORS:
                line[estimator] = _figures([member["sets"][name][estimator] for member in members])
            found.append(line)
    return found


def _figures(members: Sequence[Mapping[str, Any]]) -> Row:
    """One estimator's figures over the seeds; what is unknown at a seed is left out."""
    line: Row = {}
    for key in (*FIGURES, *OVER):
        values = [member[key] for member in members if member.get(key) is not None]
        if not values:
            continue
        line |= {key: round(_mean(values), 5), f"{key}_low": min(values), f"{key}_high": max(values)}
        if key in OVER:
            line[f"{key}_prompts"] = [
                round(_mean([member[f"{key}_{end}"] for member in members]), 5) for end in ("low", "high")
            ]
    return line


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def gain(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]] | None:
    """What the last step of the learning curve brought, seed by seed: estimator → its fall in log-loss.

    Returns:
        None where the sweep has no smaller share of the labels.
    """
    curve = [row for row in rows if row["factor"] in ("labels", "centre")]
    shares = sorted({row["share"] for row in curve})
    if len(shares) < 2:
        return None
    at = {(row["share"], row["seed"]): row["sets"][everything(row)] for row in curve}
    seeds = sorted({seed for _, seed in at if (shares[-1], seed) in at and (shares[-2], seed) in at})
    return {
        name: [at[shares[-2], s][name]["log_loss"] - at[shares[-1], s][name]["log_loss"] for s in seeds]
        for name in ("head", "head_uncalibrated", "logit_features")
    }


def verdict(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the figures say of the centre, in sentences that follow from them alone."""
    lines = summary(rows)
    centre = next(line for line in lines if line["factor"] == "centre" and line["set"] == everything(rows[0]))
    low, high = centre["head"][f"{OVER[1]}_prompts"]
    judged = "better than" if high < 0 else "worse than" if low > 0 else "not told apart from"
    said = [
        f"* By its log-loss the centre head is **{judged} the logit features**: {_over(centre['head'], OVER[1])} off "
        f"theirs, before calibration {_over(centre['head_uncalibrated'], OVER[1])}. Its AUC is "
        f"{_over(centre['head'], OVER[0])} off theirs.",
        "* Log-loss: "
        + ", ".join(f"{ESTIMATORS[name]} {centre[name]['log_loss']:.4f}" for name in ESTIMATORS if name != "confidence")
        + ".",
    ]
    if (found := gain(rows)) is not None:
        parts = [
            f"{ESTIMATORS[name]} {_mean(values):+.4f} (seeds {min(values):+.4f} … {max(values):+.4f})"
            for name, values in found.items()
        ]
        said.append(f"* The last step of the learning curve lowered the log-loss by: {', '.join(parts)}.")
    return said


def _over(figures: Mapping[str, Any], key: str) -> str:
    """A distance from the logit features, with its interval over prompts and its range over seeds."""
    low, high = figures[f"{key}_prompts"]
    seeds = f"{figures[f'{key}_low']:+.4f} … {figures[f'{key}_high']:+.4f}"
    return f"{figures[key]:+.4f} (95 % over prompts {low:+.4f} … {high:+.4f}; seeds {seeds})"


def page(raw: RawFile, notes: str) -> str:
    """The Markdown page; ``notes`` go between their marks."""
    rows = raw.rows
    lines = summary(rows)
    run = raw.runs[-1]
    whole = everything(rows[0])
    settings = run["settings"]
    centre = " ".join(f"{key}={value}" for key, value in settings["centre"].items())
    known = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    accept_rate, num_prompts = next((line["accept_rate"], line["prompts"]) for line in lines if line["set"] == whole)
    text = [
        f"# Acceptance heads for {' → '.join(settings['pair'])}",
        "",
        NOTES[0],
        notes,
        NOTES[1],
        "",
        "## The figures",
        "",
        *verdict(rows),
        "",
        f"Trained on {settings['rows']['on-policy']:,} on-policy labels, of which {settings['validation']:.0%} of the "
        f"prompts are held out for early stopping and calibration; judged on {settings['rows']['judged']:,} labels of "
        f"{num_prompts} other prompts ({accept_rate:.1%} accepted). One factor at a time differs from the centre "
        f"({centre}). **Δ**: minus the logit features (a logistic regression on all the draft's scalars with the same "
        "labels, calibrated by position) on the same rows, below 0 is better for log-loss; in brackets the 95 % "
        "interval over prompts, then the seeds' range. Lag 1 is judged on fewer rows (no pass reads a round's last "
        "candidate): compare its Δ, not its figures.",
        "",
        "| factor | value | labels | parameters | epochs | s | AUC | Δ AUC | log-loss | Δ log-loss | seeds | ECE | "
        "before calibration |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in (line for line in lines if line["set"] == whole):
        head = line["head"]
        over, (low, high) = head[OVER[1]], head[f"{OVER[1]}_prompts"]
        seeds = f"{line['seeds']}: {head[OVER[1] + '_low']:+.4f} … {head[OVER[1] + '_high']:+.4f}"
        text.append(
            f"| {line['factor']} | {line['value']} | {line['rows']:,} | {line['num_parameters']:,} | {line['epochs']} "
            f"| {line['seconds']} | {head['auc']:.4f} | {head[OVER[0]]:+.4f} | {head['log_loss']:.4f} "
            f"| {over:+.4f} ({low:+.4f} … {high:+.4f}) | {seeds} | {head['ece']:.3f} "
            f"| {line['head_uncalibrated']['log_loss']:.4f} |"
        )
    text += ["", "The centre by set (means over seeds):", "", "| set | estimate | AUC | log-loss | ECE |"]
    text.append("|---|---|---|---|---|")
    for line in (line for line in lines if line["factor"] == "centre"):
        for name, label in ESTIMATORS.items():
            cells = [_shown(line[name].get(key)) for key in FIGURES]
            heading = f"{line['set']}: {line['num']:,} labels, {line['accept_rate']:.1%} accepted"
            text.append(f"| {heading if name == 'head' else ''} | {label} | {' | '.join(cells)} |")
    commands = dict.fromkeys(each["command"] for each in raw.runs)
    text += ["", *(f"`{command}`" for command in commands), "", f"{known}; git {run['git']}", ""]
    return "\n".join(text)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def kept_notes(path: Path) -> str:
    """What was written by hand into an earlier page."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    before, mark, rest = text.partition(NOTES[0])
    return rest.partition(NOTES[1])[0].strip("\n") if mark else ""


def write(raw: RawFile, out: Path) -> Row:
    """X.jsonl, X.md and X.png; returns what the last line of the output says."""
    lines = summary(raw.rows)
    title = " → ".join(raw.runs[-1]["settings"]["pair"])
    plot(raw.rows, out.with_suffix(".png"), title)
    write_whole(out.with_suffix(".md"), page(raw, kept_notes(out.with_suffix(".md"))).encode())
    write_whole(out, "".join(json.dumps(line) + "\n" for line in lines).encode())
    whole = everything(raw.rows[0])
    centre = next(line for line in lines if line["factor"] == "centre" and line["set"] == whole)
    return {
        "out": out.name, "runs": len(raw.rows), "head": centre["head"]["log_loss"],
        "logit_features": centre["logit_features"]["log_loss"],
        "difference": centre["head"][OVER[1]], "difference_95": centre["head"][f"{OVER[1]}_prompts"],
    }  # fmt: skip


def _limit(heads: Sequence[Mapping[str, Any]], key: str) -> float:
    """Half of an axis that shows all but the configurations that are far worse than most."""
    reach = [
        max(abs(end) for end in (*head[f"{key}_prompts"], head[f"{key}_low"], head[f"{key}_high"])) for head in heads
    ]
    usual = sorted(reach)[len(reach) // 2]
    return 1.1 * max(each for each in reach if each <= 5 * usual)


def plot(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """The learning curve with the seeds' range, and each configuration's distance from the logit features."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [line for line in summary(rows) if line["set"] == everything(rows[0])]
    height = max(4.0, 0.27 * len(lines) + 1.6)
    shape = {"figsize": (15, height), "layout": "constrained", "width_ratios": (1.25, 1, 1)}
    figure, (left, middle, right) = pyplot.subplots(1, 3, **shape)
    figure.suptitle(f"{title}: heads beside the draft's own logits, {lines[0]['num']:,} held-out labels")
    curve = sorted((line for line in lines if line["factor"] in ("centre", "labels")), key=lambda line: line["rows"])
    styles = {
        "head": ("tab:orange", "o"), "head_uncalibrated": ("tab:red", "v"), "logit_features": ("tab:blue", "s"),
        "confidence_calibrated": ("tab:green", "^"),
    }  # fmt: skip
    for name, (colour, marker) in styles.items():
        labels = [line["rows"] for line in curve]
        left.plot(
            labels, [line[name]["log_loss"] for line in curve], marker, ls="-", color=colour, label=ESTIMATORS[name]
        )
        ends = [[line[name][f"log_loss_{end}"] for line in curve] for end in ("low", "high")]
        left.fill_between(labels, *ends, color=colour, alpha=0.15, linewidth=0)
    left.set(xscale="log", xlabel="training labels", ylabel="log-loss on other prompts (lower is better)")
    left.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    left.set_xticks([line["rows"] for line in curve])
    left.minorticks_off()
    left.set_title(f"learning curve of the centre (band: {lines[0]['seeds']} seeds)", fontsize=10)
    left.legend(fontsize=8)
    names = ["centre" if line["factor"] == "centre" else f"{line['factor']}: {line['value']}" for line in lines]
    for axes, key, side in ((middle, OVER[1], "left"), (right, OVER[0], "right")):
        limit = _limit([line["head"] for line in lines], key)
        for place, line in enumerate(lines):
            head = line["head"]
            if abs(head[key]) > limit:
                edge = limit if head[key] > 0 else -limit
                style = {"ha": "right" if edge > 0 else "left", "va": "center", "fontsize": 8, "color": "tab:orange"}
                axes.text(edge, place, f"{head[key]:+.3f}", **style)
                continue
            axes.plot(head[f"{key}_prompts"], [place, place], "-", color="0.75", linewidth=5, solid_capstyle="butt")
            axes.plot([head[f"{key}_low"], head[f"{key}_high"]], [place, place], "-", color="tab:orange", linewidth=2)
            axes.plot(head[key], place, "o", color="tab:orange", markersize=5)
        axes.set_xlim(-limit, limit)
        axes.xaxis.set_major_locator(pyplot.MaxNLocator(5))
        axes.axvline(0, color="tab:blue", linewidth=1)
        axes.set_ylim(len(lines) - 0.5, -0.5)
        axes.set_title(
            f"{'AUC' if key == OVER[0] else 'log-loss'} minus the logit features' ({side} is better)", fontsize=10
        )
        axes.grid(axis="x", color="0.9")
        axes.tick_params(labelsize=8)
    middle.set_yticks(range(len(lines)), names)
    right.set_yticks(range(len(lines)), [""] * len(lines))
    middle.set_xlabel("grey: 95 % over prompts; orange: the seeds' range, or a number off the scale", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
