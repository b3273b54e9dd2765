# SPDX-License-Identifier: Apache-2.0
"""Turn a head's score into a probability, and measure how good it is on prompts that it never saw.

Example: vllm-specdecpp calibrate heads/mine --fit data/train --evaluate data/eval
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import Field

from vllm_specdecpp.data.dataset import load_rows, open_datasets
from vllm_specdecpp.data.manifest import Manifest
from vllm_specdecpp.files import check_free, write_whole
from vllm_specdecpp.head.files import CONFIG_FILE, Calibration, update_config
from vllm_specdecpp.head.model import AcceptanceHead
from vllm_specdecpp.training import plots
from vllm_specdecpp.training.fit.calibration import shift_of
from vllm_specdecpp.training.fit.calibration_report import markdown
from vllm_specdecpp.training.fit.estimates import (
    Estimate,
    Scored,
    by_set,
    fit_estimates,
    judge,
    score_rows,
)
from vllm_specdecpp.training.fit.held_out import prompts_of, refuse_seen, training_data
from vllm_specdecpp.training.options import POSITIONAL, CommandOptions
from vllm_specdecpp.training.statistics import chance_ece, reliability
from vllm_specdecpp.training.trained_head import load_head

ROWS_FILE, TABLE_FILE, PLOT_FILE = FILES = ("rows.jsonl", "calibrate.md", "reliability.png")
RESAMPLES = 300
"""Of the prompts, behind the 95 % intervals."""

BEFORE_FILE = CONFIG_FILE + ".before"
PLOTTED = {
    "head": "head",
    "head_uncalibrated": "head before calibration",
    "confidence": "top-1 probability",
}
"""Estimates in the reliability plot and their names there: more lines than these hide each other."""


class CalibrateOptions(CommandOptions):
    """Turn a head's score into a probability, and measure it on held-out prompts.

    Fits a slope and an intercept per position (which also undoes w_rej), writes them into the head's config.json, and
    compares the head with training-free estimates: AUC, log-loss, Brier score and calibration error of each set.
    """

    head: Path = Field(json_schema_extra=POSITIONAL)
    """Folder of a trained head; its config.json as it was stays beside it as config.json.before."""

    fit: list[Path] = Field(min_length=1)
    """Datasets to fit on; prompts that the head was trained on are left out."""

    evaluate: list[Path] = []
    """Datasets to measure on, with prompts that the head was neither trained nor calibrated on; without any, only the
    calibration is fitted."""

    out: Path | None = None
    """Folder for rows.jsonl, calibrate.md and reliability.png; by default ``calibration`` in the head's folder."""

    seed: int = Field(default=0, ge=0)
    """Of the resamples of the prompts behind the 95 % intervals."""

    force: bool = False
    """Replace an earlier calibration and its results."""

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return self.head / "calibration" if self.out is None else self.out


def run(options: CalibrateOptions) -> int:
    """Calibrate and measure as ``options`` say; the head changes last, after everything else went well.

    Raises:
        ValueError: one line: no head, foreign data, prompts that the head knows, results that are there already.
    """
    _check(options)
    datasets = open_datasets([*options.fit, *options.evaluate])
    num = len(options.fit)
    head = _head(options, datasets[0].manifest)
    shift = shift_of(head.metadata)
    trained = training_data(options.head)
    refuse_seen(datasets[num:], datasets[:num], trained, "fit")
    if (prompts := prompts_of(datasets[:num])) and all(map(trained.was_fitted_to, prompts)):
        raise ValueError(
            f"specdecpp: fit={options.fit[0]}: the head was trained on all of its prompts, which would make it look "
            "too good; fit on another dataset, or train with --validation"
        )
    rows = load_rows(options.fit, head.lag, prompts_where=lambda prompt: not trained.was_fitted_to(prompt))
    names = ", ".join(dataset.folder.resolve().name for dataset in datasets[:num])
    fitted_on = f"{len(rows):,} candidates of {len(rows.prompt.unique()):,} prompts of {names}"
    calibration, estimates = fit_estimates(score_rows(head, rows), shift)
    if options.evaluate:
        scored = score_rows(head, load_rows(options.evaluate, head.lag))
        _report(options, datasets[0].manifest.pair, head, calibration, fitted_on, scored, estimates)
    _write_calibration(options.head, calibration, fitted_on)
    print(f"calibrated {options.head}: {calibration.shown()}; fitted on {fitted_on}")
    if "rule" in head.metadata:
        print("its stop rule was tuned before this calibration: run vllm-specdecpp tune again", file=sys.stderr)
    return 0


def _check(options: CalibrateOptions) -> None:
    """Refuse before any work what could not be written in the end."""
    if not options.evaluate:
        if options.out is not None:
            raise ValueError(f"specdecpp: out={str(options.out)!r} stays empty without --evaluate; name datasets there")
        return
    plots.check_installed()
    check_free(options.folder, FILES, options.force)


def _head(options: CalibrateOptions, manifest: Manifest) -> AcceptanceHead:
    """The head, checked to be of the data's pair and not calibrated yet."""
    head = load_head(options.head, manifest)
    if head.calibration is not None and not options.force:
        raise ValueError(
            f"specdecpp: head={str(options.head)!r} is calibrated already (on {head.calibration.fitted_on}); "
            "add --force to do it again"
        )
    return head


def _report(
    options: CalibrateOptions, pair: str, head: AcceptanceHead, calibration: Calibration, fitted_on: str,
    scored: Scored, estimates: dict[str, Estimate],
) -> None:  # fmt: skip
    """rows.jsonl, calibrate.md and reliability.png; the table also goes to the terminal."""
    sets = dict(by_set(scored))
    rows: list[dict[str, Any]] = []
    evaluated_on = [folder.resolve().name for folder in options.evaluate]
    same = {"lag": head.lag, "fitted_on": fitted_on, "evaluated_on": evaluated_on}
    for name, of_set in sets.items():
        found = judge(name, of_set, estimates, resamples=RESAMPLES, seed=options.seed)
        found[0]["ece_by_chance"] = chance_ece(estimates[found[0]["estimator"]](of_set), options.seed)
        rows += [{**row, **same} for row in found]
    table = markdown(rows, pair, head, calibration)
    write_whole(options.folder / ROWS_FILE, "".join(json.dumps(row) + "\n" for row in rows).encode())
    write_whole(options.folder / TABLE_FILE, table.encode())
    panels = {
        name: {
            label: reliability(estimates[estimate](of_set), of_set.rows.accepted) for estimate, label in PLOTTED.items()
        }
        for name, of_set in sets.items()
    }
    title = f"Reliability on held-out prompts: {pair}, n = {len(scored.logit):,}"
    plots.plot_reliability(panels, options.folder / PLOT_FILE, title)
    print(table)


def _write_calibration(folder: Path, calibration: Calibration, fitted_on: str) -> None:
    """Into the head's config; what it was before the first calibration is kept."""
    before = folder / BEFORE_FILE
    if not before.exists():
        write_whole(before, (folder / CONFIG_FILE).read_bytes())
    update_config(folder, calibration=calibration.model_copy(update={"fitted_on": fitted_on}).model_dump())
