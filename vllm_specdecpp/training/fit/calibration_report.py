# SPDX-License-Identifier: Apache-2.0
"""What ``calibrate`` found, as a Markdown table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_specdecpp.head.files import Calibration
from vllm_specdecpp.head.model import AcceptanceHead
from vllm_specdecpp.provenance import command_line, git_sha, versions

RIVALS = {
    "confidence_calibrated": "the calibrated top-1 probability, which the engine uses without a head",
    "logit_features_calibrated": "a logistic regression on the draft's scalars",
}
"""What a head has to beat."""


def markdown(rows: Sequence[Mapping[str, Any]], pair: str, head: AcceptanceHead, calibration: Calibration) -> str:
    """The figures as a table, with what they rest on; ``pair``: of models, as in :class:`Manifest`."""
    first = rows[0]
    known = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = [
        f"# Calibration of the head for {pair}",
        "",
        f"* Command: `{command_line()}`; commit {git_sha() or 'unknown'}; {known}",
        f"* Fitted on {first['fitted_on']}: {calibration.shown()} "
        f"(w_rej {head.metadata.get('w_rej', 1):g}, lag {head.lag}).",
        f"* Measured on {', '.join(first['evaluated_on'])}: held-out prompts, none of which the head has seen.",
        "* In brackets: 95 % intervals by bootstrap over prompts. The last column is the estimate's log-loss minus the "
        "head's on the same prompts: above 0, the head is better.",
        "* ECE, beside the head's: what a perfect estimate would show on so many rows, by chance alone.",
        *(f"* {line}" for line in verdict(rows)),
        "",
        "| set | estimate | AUC | log-loss | Brier | ECE | log-loss over the head's |",
        "|---|---|---|---|---|---|---|",
    ]
    shown = None
    for row in rows:
        heading = f"{row['set']}: {row['num']:,} rows, {row['prompts']} prompts, {row['accept_rate']:.1%} accepted"
        cells = [heading if row["set"] != shown else "", row["estimator"].replace("_", " ")]
        ece = f"{row['ece']:.3f}" + (f" ({row['ece_by_chance']:.3f})" if "ece_by_chance" in row else "")
        cells += [_ranged(row, "auc"), _ranged(row, "log_loss"), f"{row['brier']:.4f}", ece]
        lines.append(f"| {' | '.join([*cells, _ranged(row, 'log_loss_over_head', '+')])} |")
        shown = row["set"]
    return "\n".join(lines) + "\n"


def verdict(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whether the head is worth serving, by its log-loss on all sets together: a sentence a rival."""
    said = []
    for row in (row for row in rows if row["set"] == rows[-1]["set"] and row["estimator"] in RIVALS):
        low, high = row.get("log_loss_over_head_low"), row.get("log_loss_over_head_high")
        if low is None or high is None:
            continue
        judged = "better than" if low > 0 else "worse than" if high < 0 else "not told apart from"
        said.append(f"By log-loss on {row['set']}, the head is **{judged}** {RIVALS[row['estimator']]}.")
    return said


def _ranged(row: Mapping[str, Any], key: str, sign: str = "") -> str:
    """A figure with its interval; a dash where it is unknown."""
    value, low, high = (row.get(name) for name in (key, f"{key}_low", f"{key}_high"))
    if value is None:
        return "-"
    shown = f"{value:{sign}.4f}"
    return shown if low is None or high is None else f"{shown} ({low:{sign}.4f} … {high:{sign}.4f})"
