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
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator

from vllm_specdecpp import provenance
from vllm_specdecpp.data.dataset import LabelRows, load_rows, open_datasets
from vllm_specdecpp.data.prompts import PromptName, split_by_id
from vllm_specdecpp.decision.features import SCALAR_FEATURES, check_features
from vllm_specdecpp.files import write_whole
from vllm_specdecpp.head.files import CONFIG_FILE, PICKLE_FILE, SAFETENSORS_FILE
from vllm_specdecpp.head.model import AcceptanceHead
from vllm_specdecpp.training.fit.fitting import evaluate, fit, standardize, start_at_scalars
from vllm_specdecpp.training.fit.held_out import PROVENANCE_FILE, prompt_lists, prompts_of
from vllm_specdecpp.training.options import POSITIONAL, CommandOptions

LOG_FILE = "log.csv"


class TrainOptions(CommandOptions):
    """Train an acceptance head on collected labels, with early stopping on held-out prompts.

    The defaults are those that did best with 20,000 labels: a small head, held back. The paper's head, loss and
    optimiser: --lag 1 --layers 3 --width 0 --features none --no-standardize --w-rej 6 --lr 5e-5 --batch-size 32
    --epochs 3 --dropout 0 --weight-decay 0
    """

    data: list[Path] = Field(min_length=1, json_schema_extra=POSITIONAL)
    """Dataset folders of ``collect``, all of the same pair."""

    out: Path
    """Folder for the head, its log and its provenance."""

    lag: Literal[0, 1] = 0
    """0: look ahead to the candidate that is about to be drawn. 1: score the one that the draft has just read (the
    paper's head); it may still be submitted."""

    layers: int = Field(default=1, ge=0)
    """Residual blocks; 0 is a linear probe."""

    width: int | None = Field(default=16, ge=0)
    """Project the hidden state to this size first; 0: it keeps its own, as in the paper."""

    tied: bool = True
    """Whether the blocks share their parameters, as in the paper's released heads."""

    features: list[Literal["top1_prob", "entropy", "margin", "drawn_logprob", "none"]] | None = None
    """Scalars that the head reads too; by default all that the lag allows; ``none``: the hidden state alone."""

    standardize: bool = True
    """Whether each dimension of the hidden state is brought to mean 0 and deviation 1 (of the training rows) first."""

    w_rej: float = Field(default=1.0, gt=0)
    """Weight of the reject class in the loss; the paper's pick is 6. ``calibrate`` undoes it."""

    soft: bool = True
    """Whether min(1, p/q) is the label where it is known, instead of accepted or rejected."""

    lr: float = Field(default=1e-4, gt=0)
    """Peak learning rate (AdamW)."""

    weight_decay: float = Field(default=1.0, ge=0)
    """Of the matrices, not of the biases."""

    dropout: float = Field(default=0.5, ge=0, lt=1)
    """Of the hidden state and of each block's update, in training only."""

    epochs: int = Field(default=15, ge=1)
    """Passes over the data at most."""

    batch_size: int = Field(default=256, ge=1)
    """Rows a step."""

    warmup: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps over which the learning rate rises; then it falls as a cosine does."""

    patience: int = Field(default=5, ge=1)
    """Epochs without a better validation log-loss after which training ends; the best weights are kept."""

    validation: float = Field(default=0.2, ge=0, lt=1)
    """Share of the prompts that is held out for early stopping, and for ``calibrate`` and ``tune``, which may use no
    others of these; chosen by a hash of their ids; 0 for none."""

    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of the weights, the order of the rows, the dropout and the held-out prompts: same seed, same head."""

    max_rows: int | None = Field(default=None, ge=1)
    """Train on whole prompts up to this many rows only, always the same ones of a seed: for learning curves."""

    force: bool = False
    """Replace the head that ``out`` holds."""

    @field_validator("width")
    @classmethod
    def _own_width(cls, width: int | None) -> int | None:
        return width or None

    @model_validator(mode="after")
    def _check_together(self) -> TrainOptions:
        if self.features and "none" in self.features and len(self.features) > 1:
            raise ValueError("specdecpp: features=none goes alone; leave out either it or the others")
        check_features(self.resolved_features, self.lag)
        return self

    @property
    def resolved_features(self) -> list[str]:
        """The scalars in force."""
        if self.features is None:
            return [name for name in SCALAR_FEATURES if self.lag or name != "drawn_logprob"]
        return [name for name in self.features if name != "none"]


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
        options: ``data``, ``out``, ``validation``, ``max_rows`` and ``force`` are not read.
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
        start_at_scalars(head, rows, options.w_rej, options.soft)
        history = fit(head, rows, val_rows, options, on_epoch)
    head.metadata = {"w_rej": options.w_rej, "soft": options.soft}
    return head, history


def some_prompts(rows: LabelRows, max_rows: int, seed: int) -> LabelRows:
    """Rows of whole prompts in an order of ``seed``, ``max_rows`` at most; a larger subset holds the smaller ones."""
    prompts, counts = rows.prompt.unique(return_counts=True)
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))
    taken = prompts[order][counts[order].cumsum(0) <= max_rows]
    if len(taken) == 0:
        raise ValueError(
            f"specdecpp: max_rows={max_rows} is less than one prompt's rows ({int(counts[order[0]])}); raise it"
        )
    return rows.select(torch.isin(rows.prompt, taken))


def run(options: TrainOptions) -> int:
    """Train as ``options`` say, and write the head, ``log.csv`` and ``provenance.json``.

    Raises:
        ValueError: one line: ``out`` holds a head already, or the data cannot be trained on.
    """
    _check_out(options)
    start = time.perf_counter()
    datasets = open_datasets(options.data)
    manifests = [dataset.manifest for dataset in datasets]

    def held_out(prompt: PromptName) -> bool:
        return split_by_id(prompt[0], options.validation, options.seed)

    rows = load_rows(options.data, options.lag, prompts_where=lambda prompt: not held_out(prompt))
    if options.max_rows is not None:
        rows = some_prompts(rows, options.max_rows, options.seed)
    val_rows = None
    if options.validation > 0:
        val_rows = load_rows(options.data, options.lag, prompts_where=held_out)
    head, history = train_head(rows, val_rows, options, lambda history: _write_log(options.out, history))
    head.metadata |= {"draft": manifests[0].draft, "target": manifests[0].target}
    head.save_pretrained(options.out, overwrite=options.force)
    best = next(row for row in reversed(history) if row["best"])
    metrics: dict[str, Any] = {
        "best_epoch": best["epoch"], "train_loss": _rounded(best["train_loss"]) if best["epoch"] else None,
        "num_rows": len(rows),
        "num_validation_rows": None if val_rows is None else len(val_rows.hidden),
        "num_validation_prompts": None if val_rows is None else len(val_rows.prompt.unique()),
        "num_parameters": head.num_parameters, "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip
    if val_rows is not None:
        found = evaluate(head, val_rows, options.w_rej, options.soft)
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


def _check_out(options: TrainOptions) -> None:
    """Refuse before any work to replace what is not to be replaced."""
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"specdecpp: out={str(options.out)!r} is a file; name a folder")
    present = [name for name in (CONFIG_FILE, SAFETENSORS_FILE, PICKLE_FILE) if (options.out / name).exists()]
    if present and not options.force:
        raise ValueError(
            f"specdecpp: out={str(options.out)!r} holds a head already ({', '.join(present)}); name another folder, or "
            "add --force to replace it"
        )


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
