# SPDX-License-Identifier: Apache-2.0
"""Train an acceptance head on collected labels.

Example: vllm-specdecpp train data/train --out heads/mine
"""

from __future__ import annotations

import csv
import io
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vllm_specdecpp import provenance
from vllm_specdecpp.data.dataset import LabelRows, load_rows, open_datasets
from vllm_specdecpp.data.prompts import PromptName, split_by_id
from vllm_specdecpp.files import check_free, write_whole
from vllm_specdecpp.head.files import CONFIG_FILE, PICKLE_FILE, SAFETENSORS_FILE
from vllm_specdecpp.head.model import AcceptanceHead
from vllm_specdecpp.training.fit.fitting import evaluate, fit, standardize, start_at_scalars
from vllm_specdecpp.training.fit.held_out import PROVENANCE_FILE, prompt_lists, prompts_of
from vllm_specdecpp.training.fit.train_options import TrainOptions

LOG_FILE = "log.csv"


def train_head(
    rows: LabelRows,
    val_rows: LabelRows | None,
    options: TrainOptions,
    on_epoch: Callable[[list[dict[str, Any]]], None] = lambda history: None,
) -> tuple[AcceptanceHead, list[dict[str, Any]]]:
    """Fit a new head.

    Args:
        rows: training rows.
        val_rows: for early stopping; None trains all epochs.
        options: ``data``, ``out``, ``validation`` and ``force`` are not read.
        on_epoch: called with the history so far after every epoch.

    Returns:
        The head in evaluation mode, and one row an epoch (``fitting.fit``).

    Raises:
        ValueError: one line: the loss ran away.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        head = AcceptanceHead(
            rows.hidden.shape[1], options.layers, options.tied,
            width=options.width, features=options.resolved_features, lag=options.lag, standardize=options.standardize,
        )  # fmt: skip
        if options.standardize:
            standardize(head, rows.hidden)
        start_at_scalars(head, rows, options.w_rej)
        history = fit(head, rows, val_rows, options, on_epoch)
    head.metadata = {"w_rej": options.w_rej}
    return head, history


def run(options: TrainOptions) -> int:
    """Train as ``options`` say, and write the head, ``log.csv`` and ``provenance.json``.

    Raises:
        ValueError: one line: ``out`` holds a head already, or the data cannot be trained on.
    """
    check_free(options.out, (CONFIG_FILE, SAFETENSORS_FILE, PICKLE_FILE), options.force)
    start = time.perf_counter()
    datasets = open_datasets(options.data)
    manifests = [dataset.manifest for dataset in datasets]

    def held_out(prompt: PromptName) -> bool:
        return split_by_id(prompt[0], options.validation, options.seed)

    rows = load_rows(options.data, options.lag, prompts_where=lambda prompt: not held_out(prompt))
    val_rows = None
    if options.validation > 0:
        val_rows = load_rows(options.data, options.lag, prompts_where=held_out)
    head, history = train_head(rows, val_rows, options, lambda history: _write_log(options.out, history))
    head.metadata |= {"draft": manifests[0].draft, "target": manifests[0].target}
    head.save_pretrained(options.out)
    best = next(row for row in reversed(history) if row["best"])
    metrics: dict[str, Any] = {
        "best_epoch": best["epoch"], "train_loss": _rounded(best["train_loss"]) if best["epoch"] else None,
        "num_rows": len(rows),
        "num_validation_rows": None if val_rows is None else len(val_rows.hidden),
        "num_validation_prompts": None if val_rows is None else len(val_rows.prompt.unique()),
        "num_parameters": head.num_parameters, "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip
    if val_rows is not None:
        found = evaluate(head, val_rows, options.w_rej)
        metrics |= {f"val_{key}": _rounded(value) for key, value in found.items()}
        metrics["val_log_loss_at_start"] = _rounded(history[0]["val_log_loss"])
    _write_provenance(options, manifests, metrics, prompts_of(datasets))
    print(json.dumps({"head": str(options.out), **metrics}))
    if advice := advice_on(history, options):
        print(f"specdecpp: {advice}", file=sys.stderr)
    return 0


def advice_on(history: Sequence[Mapping[str, Any]], options: TrainOptions) -> str | None:
    """What a training's history asks for, in one line; None if it is as it should be.

    Args:
        history: of :func:`train_head`.
        options: that it was made with.
    """
    best = next(row["epoch"] for row in reversed(history) if row["best"])
    if "val_log_loss" not in history[0]:
        return None
    if best == 0 and options.resolved_features:
        return (
            "the best epoch is 0: the hidden state added nothing to the draft's scalars; collect more labels, or serve "
            "without a head"
        )
    if best == options.epochs:
        return f"the last epoch was the best; try --epochs {2 * options.epochs}, or a higher --lr than {options.lr:g}"
    return None


def _rounded(value: float) -> float:
    return round(value, 6)


def _write_log(folder: Path, history: list[dict[str, Any]]) -> None:
    """``log.csv``, one row an epoch so far."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(history[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_whole(folder / LOG_FILE, text.getvalue().encode())


def _write_provenance(
    options: TrainOptions, manifests: list[Any], metrics: dict[str, Any], prompts: Iterable[PromptName]
) -> None:
    """``provenance.json``: what the head was made from, and how to make it again."""
    content = {
        "command": provenance.command_line(),
        "git": provenance.git_sha(),
        "versions": provenance.versions(),
        "created": provenance.now(),
        "seed": options.seed,
        "validation": options.validation,
        "options": options.model_dump(mode="json", exclude={"data", "out", "force"}),
        "features": options.resolved_features,
        "data": [
            {"folder": folder.name, "manifest": asdict(manifest)}
            for folder, manifest in zip(options.data, manifests, strict=True)
        ],
        "metrics": metrics,
        "prompts": prompt_lists(prompts, options.validation, options.seed),
    }
    write_whole(options.out / PROVENANCE_FILE, (json.dumps(content, indent=2) + "\n").encode())
