# SPDX-License-Identifier: Apache-2.0
"""Train heads over one factor at a time around a centre, and judge each beside what needs no hidden state.

    python -m benchmarks.heads.sweep --train data/train --evaluate data/eval --seeds 3 --out benchmarks/results/X.jsonl

Each run trains, calibrates and judges with the package's own functions. A row a run is appended to X.raw.jsonl: the
same command goes on after an interruption, and with more ``--seeds`` or ``--factors`` it measures what is missing.
X.jsonl has a row a configuration and set, X.md is the page, X.png the plot. The last line of the output is JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from benchmarks.common.provenance import command_line, git_state, versions
from benchmarks.common.records import RawFile, Row
from benchmarks.heads import report as head_sweep_report
from vllm_specdecpp.cli import parse
from vllm_specdecpp.data.dataset import LabelRows, load_rows, open_datasets
from vllm_specdecpp.data.prompts import split_by_id
from vllm_specdecpp.decision.features import SCALAR_FEATURES, encode_scalars
from vllm_specdecpp.training import plots
from vllm_specdecpp.training.fit.calibration import fit_by_prompts, fit_regression
from vllm_specdecpp.training.fit.estimates import Estimate, Scored, by_set, fit_estimates, judge, score_rows
from vllm_specdecpp.training.fit.fitting import targets
from vllm_specdecpp.training.fit.held_out import TrainingData, refuse_seen
from vllm_specdecpp.training.fit.train import TrainOptions, some_prompts, train_head
from vllm_specdecpp.training.options import CommandOptions

MODULE = "benchmarks.heads.sweep"
CENTRE: dict[str, Any] = {
    name: TrainOptions.model_fields[name].default
    for name in ("lag", "width", "layers", "tied", "w_rej", "lr", "dropout", "weight_decay", "epochs", "patience")
}
"""What ``train`` does by default: for the Qwen pair, with 20,000 labels, nothing larger or less held back is better."""

LARGE: dict[str, Any] = {
    "width": None, "layers": 3, "lr": 3e-4, "dropout": 0.1, "weight_decay": 0.1, "epochs": 10, "patience": 3,
}  # fmt: skip
"""The paper's size with the usual regularisation."""

PAPERS: dict[str, Any] = {
    "lag": 1, "width": None, "layers": 3, "tied": True, "features": ["none"], "standardize": False, "w_rej": 6.0,
    "lr": 5e-5, "batch_size": 32, "epochs": 3, "patience": 3, "dropout": 0.0, "weight_decay": 0.0, "warmup": 0.03,
}  # fmt: skip
"""SpecDec++ (arXiv:2405.19715): its head, its loss and its optimiser."""

Factor = Literal["labels", "depth", "tied", "width", "w_rej", "inputs", "lag", "large", "recipe"]
FACTORS: tuple[Factor, ...] = get_args(Factor)


class HeadSweepOptions(CommandOptions):
    """Train heads over one factor at a time around a centre, and judge each beside what needs no hidden state."""

    train: list[Path] = Field(min_length=1)
    """Datasets of collect to train and calibrate on."""

    evaluate: list[Path] = Field(min_length=1)
    """Datasets to judge on, with other prompts."""

    out: Path
    """X.jsonl; also writes X.raw.jsonl, X.md, X.png."""

    factors: list[Factor] = list(FACTORS)
    """What to vary around the centre."""

    shares: list[float] = [0.125, 0.25, 0.5]
    """Of the training labels, for the learning curve (factor labels); the centre has them all."""

    centre: str = "{}"
    """JSON object of train options that differ from the centre, which is what the command train does by default."""

    seeds: int = Field(default=3, ge=1)
    """Runs a configuration: of the weights, the order, the dropout, and the prompts held out for early stopping."""

    validation: float = Field(default=0.1, gt=0, lt=1)
    """Share of the training prompts for early stopping and calibration."""

    bootstrap: int = Field(default=200, ge=1)
    """Resamples of the evaluation prompts behind the 95 % intervals."""

    minutes: float | None = Field(default=None, gt=0)
    """Start no run later than this; the same command goes on."""

    force: bool = False
    """Replace a finished report; raw rows are always kept."""


@dataclass(frozen=True)
class Config:
    """One configuration: the centre, some of it changed."""

    factor: str
    value: str
    changes: dict[str, Any] = field(default_factory=dict, hash=False)
    share: float = 1.0


def grid(factors: Sequence[str], shares: Sequence[float]) -> list[Config]:
    """The configurations, the centre first."""
    found = [Config("centre", "centre")]
    if "labels" in factors:
        found += [Config("labels", f"{share:g}", share=share) for share in sorted(set(shares)) if share < 1]
    changes: dict[str, dict[str, dict[str, Any]]] = {
        "depth": {str(depth): {"layers": depth} for depth in (0, 2, 3, 4)},
        "tied": {"3 untied": {"layers": 3, "tied": False}},
        "width": {"64": {"width": 64}, "full": {"width": None}},
        "w_rej": {"3": {"w_rej": 3.0}, "6": {"w_rej": 6.0}},
        "inputs": {
            "hidden state alone": {"features": ["none"]},
            "hidden state alone, lr 1e-3": {"features": ["none"], "lr": 1e-3},
        },
        "lag": {"1, hidden state alone": {"lag": 1}},
        "large": {"full width, 3 blocks, held back less": LARGE},
    }
    found += [
        Config(factor, value, change) for factor in FACTORS for value, change in changes.get(factor, {}).items()
        if factor in factors
    ]  # fmt: skip
    if "recipe" in factors:
        longer = {name: PAPERS[name] for name in ("lag", "width", "layers", "tied", "features", "w_rej")}
        found += [Config("recipe", "paper's", PAPERS), Config("recipe", "paper's, trained as the centre", longer)]
    return found


class Data:
    """Rows of the datasets by source and lag, read once each."""

    def __init__(self, options: HeadSweepOptions) -> None:
        self._options = options
        datasets = open_datasets([*options.train, *options.evaluate])
        num = len(options.train)
        refuse_seen(datasets[num:], datasets[:num], TrainingData(), "train")
        manifests = [dataset.manifest for dataset in datasets]
        self.pair = tuple(str(name).rpartition("/")[2] for name in (manifests[0].draft, manifests[0].target))
        self.sampling = [manifest.sampling for manifest in manifests]
        self.rows, self.without_head = cache(self._rows), cache(self._without_head)

    def _rows(self, source: str, lag: int) -> LabelRows:
        return load_rows(self._options.train if source == "on-policy" else self._options.evaluate, lag)

    def split(self, lag: int, seed: int) -> tuple[LabelRows, LabelRows]:
        """Rows to train on, and those of the prompts held out."""
        rows = self.rows("on-policy", lag)
        held = torch.tensor([split_by_id(name, self._options.validation, seed) for name, _ in rows.prompts])
        return rows.select(~held[rows.prompt]), rows.select(held[rows.prompt])

    def _without_head(self, lag: int, seed: int, share: float) -> dict[str, Estimate]:
        """Fitted to the labels of the training prompts and of those held out."""
        rows, held_out = self.split(lag, seed)
        rows = rows if share == 1 else some_prompts(rows, int(share * len(rows)), seed)
        return without_head(LabelRows.concat([rows, held_out]))


def train_options_of(config: Config, seed: int, options: HeadSweepOptions) -> TrainOptions:
    """ValueError for a centre that ``train`` does not know."""
    try:
        centre = json.loads(options.centre)
    except ValueError as error:
        raise ValueError(f"--centre is not JSON ({error})") from None
    settings = {**CENTRE, **centre, **config.changes, "seed": seed}
    return TrainOptions(data=options.train, out=options.out, **settings)


def run_one(config: Config, seed: int, data: Data, options: HeadSweepOptions) -> Row:
    """Train, calibrate and judge one head.

    All heads are calibrated on the labels of the held-out prompts; the estimates without a head are fitted to those of
    both the training and the held-out prompts.
    """
    started = time.perf_counter()
    train_options = train_options_of(config, seed, options)
    lag = train_options.lag
    rows, held_out = data.split(lag, seed)
    if config.share < 1:
        rows = some_prompts(rows, int(config.share * len(rows)), seed)
    head, history = train_head(rows, held_out, train_options)
    seconds = time.perf_counter() - started
    estimates = {
        **data.without_head(lag, seed, config.share),
        **with_head(score_rows(head, held_out), float(torch.tensor(train_options.w_rej).log())),
    }
    scored = score_rows(head, data.rows("judged", lag))
    return {
        "factor": config.factor, "value": config.value, "seed": seed, "share": config.share,
        "changes": config.changes, "rows": len(rows), "held_out_rows": len(held_out), "lag": lag,
        "trained_prompts": len(rows.prompt.unique()), "num_parameters": head.num_parameters,
        "best_epoch": next(row["epoch"] for row in reversed(history) if row["best"]), "epochs": history[-1]["epoch"],
        "seconds": round(seconds, 2),
        "sets": {
            # The bootstrap is for all sets together, which come last.
            name: figures(name, of_set, estimates, options.bootstrap if len(of_set.rows) == len(scored.rows) else None)
            for name, of_set in by_set(scored)
        },
    }  # fmt: skip


def without_head(rows: LabelRows) -> dict[str, Estimate]:
    """Estimates from the draft's logits, each with a slope and an intercept a position; the strongest one first."""
    label = targets(rows, soft=True)

    def inputs(of: LabelRows) -> Tensor:
        return encode_scalars(of.scalars, SCALAR_FEATURES)  # [n, num_inputs]

    regression = fit_regression(inputs(rows), label)
    found = fit_by_prompts(regression.logit(inputs(rows)), label, rows.position, rows.prompt)
    _, others = fit_estimates(Scored(rows, torch.zeros(len(rows))), 0.0)
    return {
        "logit_features": lambda scored: found.probability(regression.logit(inputs(scored.rows)), scored.rows.position),
        **{name: others[name] for name in ("confidence", "confidence_calibrated", "entropy_calibrated")},
    }


def with_head(held_out: Scored, shift: float) -> dict[str, Estimate]:
    """The head calibrated on ``held_out``, and as it was trained but for ``shift`` = ln w_rej."""
    calibration, _ = fit_estimates(held_out, shift)
    return {
        "head": lambda scored: calibration.probability(scored.logit, scored.rows.position),
        "head_uncalibrated": lambda scored: (scored.logit.double() + shift).sigmoid(),
    }


def figures(name: str, scored: Scored, estimates: dict[str, Estimate], bootstrap: int | None) -> Row:
    """Of one set: AUC, log-loss and ECE of each estimate; with a bootstrap also how far from the logit features."""
    kept: tuple[str, ...] = ("auc", "log_loss", "ece")
    if bootstrap is not None:
        over = [f"{key}_over_logit_features" for key in kept[:2]]
        kept += (*over, *(f"{key}_{end}" for key in over for end in ("low", "high")))
    found = judge(name, scored, estimates, resamples=bootstrap or 1, seed=0)
    shared = {key: found[0][key] for key in ("num", "prompts", "accept_rate")}
    shared["accept_rate"] = round(shared["accept_rate"], 5)
    return shared | {
        row["estimator"]: {key: row[key] if row[key] is None else round(row[key], 5) for key in kept if key in row}
        for row in found
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: see the module's docstring."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        options: HeadSweepOptions = parse(HeadSweepOptions, arguments, f"python -m {MODULE}")
        return run(options, command_line(arguments, MODULE))
    except ValidationError as error:
        problem = "; ".join(f"--{'-'.join(map(str, each['loc'][:1]))}: {each['msg']}" for each in error.errors())
    except ValueError as error:
        problem = str(error).removeprefix("specdecpp: ")
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    print(f"{MODULE}: {problem}", file=sys.stderr)
    return 2


def run(options: HeadSweepOptions, command: str, say: Callable[[str], None] = print) -> int:
    """Measure what is missing and write the report."""
    started = time.monotonic()
    plots.check_installed()
    configs = grid(options.factors, options.shares)
    raw_path = head_sweep_report.check_paths(options.out, options.force)
    for config in configs:
        train_options_of(config, 0, options)
    data = Data(options)
    raw = RawFile(raw_path)
    shared = {
        "pair": list(data.pair), "centre": {**CENTRE, **json.loads(options.centre)},
        "rows": {source: len(data.rows(source, 0)) for source in ("on-policy", "judged")},
        "validation": options.validation, "bootstrap": options.bootstrap,
    }  # fmt: skip
    raw.start_run(shared, {
        "command": command, "versions": versions(), "git": git_state(), "sampling": data.sampling,
    })  # fmt: skip
    done = {(row["factor"], row["value"], row["seed"]) for row in raw.rows}
    # Seed after seed: an interruption leaves all configurations equally measured.
    todo = [(config, seed) for seed in range(options.seeds) for config in configs]
    todo = [(config, seed) for config, seed in todo if (config.factor, config.value, seed) not in done]
    for number, (config, seed) in enumerate(todo, start=1):
        if options.minutes is not None and time.monotonic() - started > 60 * options.minutes:
            say(f"time is up with {len(todo) - number + 1} runs to go; the same command goes on")
            return 0
        row = run_one(config, seed, data, options)
        raw.add(row)
        found = row["sets"][head_sweep_report.everything(row)]
        ours, theirs = found["head"], found["logit_features"]
        say(
            f"{number}/{len(todo)} {config.factor} {config.value}, seed {seed}: {row['rows']} rows, "
            f"AUC {ours['auc']} (logit features {theirs['auc']}), log-loss {ours['log_loss']} ({theirs['log_loss']})"
        )
    say(json.dumps(head_sweep_report.write(raw, options.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
