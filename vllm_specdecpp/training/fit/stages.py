# SPDX-License-Identifier: Apache-2.0
"""The stages of ``fit``: how to tell that one is done, and how to do it."""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_specdecpp.costs import file as cost_file
from vllm_specdecpp.data.manifest import MANIFEST_FILE
from vllm_specdecpp.data.prompts import Prompt
from vllm_specdecpp.data.shards import create_dataset
from vllm_specdecpp.decision.estimator import ConfidenceEstimator, Estimator, HeadEstimator
from vllm_specdecpp.decision.features import features_from_logits
from vllm_specdecpp.files import write_whole
from vllm_specdecpp.head.files import CONFIG_FILE
from vllm_specdecpp.head.model import AcceptanceHead
from vllm_specdecpp.provenance import hardware, model_label
from vllm_specdecpp.training.collect import command as collect
from vllm_specdecpp.training.collect.options import CollectOptions, PairOptions
from vllm_specdecpp.training.collect.pass_costs import measure_costs
from vllm_specdecpp.training.fit import calibrate, train
from vllm_specdecpp.training.fit.options import FitOptions
from vllm_specdecpp.training.model_config import model_config
from vllm_specdecpp.training.replay import tune

_TIMES = 50
"""How often the head is timed."""


@dataclass(frozen=True)
class Stage:
    """One step on the way, with what it leaves."""

    name: str
    output: Path
    is_done: Callable[[], bool]
    """Whether its output is whole. Raises ValueError if it was made otherwise."""
    run: Callable[[], object]


def num_done(stages: Sequence[Stage]) -> int:
    """How many stages, from the first one on, are done.

    Raises:
        ValueError: a later one is, whose output would not be that of what is made now; or a stage's own.
    """
    done = [stage.is_done() for stage in stages]
    first = (*done, False).index(False)
    if True in done[first:]:
        later, missing = stages[done.index(True, first)].output, stages[first].output
        raise ValueError(
            f"specdecpp: {later} is there, but {missing}, which comes before it, is not whole; restore that, or remove "
            f"{later} to make it again"
        )
    return first


def stages_of(options: FitOptions, fitted: Sequence[Prompt], judging: Sequence[Prompt]) -> list[Stage]:
    """The stages in order. What an interrupted one has left is replaced; what is whole never is."""
    out, head = options.out, options.out / "head"
    data, held_out = out / "data" / "train", out / "data" / "eval"
    training = train.TrainOptions(data=[data], out=head, seed=options.seed, force=True)
    stages = [_collecting(options, data, fitted), _collecting(options, held_out, judging)]
    pair = {"target": model_label(options.target), "draft": model_label(options.draft)}
    if (costs := options.costs) is not None:
        found = cost_file.read(costs).setting
        if other := [name for name, label in pair.items() if found.get(name) != label]:
            raise ValueError(
                f"specdecpp: costs={costs} is of the {other[0]} {found.get(other[0])!r}, not {pair[other[0]]!r}; give "
                "the file of an engine of this pair, or leave it out"
            )
    else:
        how = {name: str(getattr(options, name)) for name in ("dtype", "eager", "tensor_parallel_size")}
        file = cost_file.CostFile(out / "costs", pair | how | {"device": hardware()})
        costs = file.path

        def measure() -> None:
            if not file.save(measure_costs(options, fitted)):
                raise ValueError(f"specdecpp: {file.path} cannot be written; free space and run the same command again")

        stages.append(Stage("costs", file.path, lambda: file.load() is not None, measure))
    judge_by: dict[str, Any] = {"evaluate": [held_out], "seed": options.seed, "force": True}
    calibration = calibrate.CalibrateOptions(head=head, fit=[data], **judge_by)

    def tuned() -> int:
        vocabulary = model_config(options.draft, "draft").get_text_config().vocab_size
        added = 1000 * head_seconds(AcceptanceHead.from_pretrained(head), vocabulary)
        last = tune.TuneOptions(head=head, data=[data], costs=costs, out=out / "tune", head_ms=added, **judge_by)
        return _quietly(tune.run, last)

    def is_tuned() -> bool:
        return "rule" in _content(head / CONFIG_FILE) and (out / "tune" / "rows.jsonl").exists()

    return [
        *stages,
        Stage("train", head, lambda: _is_trained(training), lambda: _quietly(train.run, training)),
        Stage(
            "calibrate", head / "calibration", lambda: "calibration" in _content(head / CONFIG_FILE),
            lambda: _quietly(calibrate.run, calibration),
        ),
        Stage("tune", out / "tune", is_tuned, tuned),
    ]  # fmt: skip


def _quietly(run: Callable[[Any], int], options: Any) -> int:
    """Without the tables on stdout, which are in files too."""
    with contextlib.redirect_stdout(io.StringIO()):
        return run(options)


def head_seconds(head: AcceptanceHead, vocab_size: int) -> float:
    """What a head of lag 0 adds to one request's draft pass: itself, and the scalars beyond the top-1 probability."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    logits, hidden = (torch.randn(1, size, device=device) for size in (vocab_size, head.hidden_size))

    def timed(estimator: Estimator) -> float:
        start = time.perf_counter()
        estimator(features_from_logits(logits, hidden, needs=estimator.needs), 1).item()
        return time.perf_counter() - start

    with_head, without = HeadEstimator(head.to(device)), ConfidenceEstimator()
    return max(statistics.median(timed(with_head) - timed(without) for _ in range(_TIMES)), 0.0)


def _collecting(options: FitOptions, folder: Path, prompts: Sequence[Prompt]) -> Stage:
    """Of the prompts, which go into a file that ``collect`` reads."""
    file = folder.with_suffix(".jsonl")
    taken = options.model_dump(include=PairOptions.model_fields.keys() - {"prompts", "limit", "split", "column"})
    collecting = CollectOptions(**taken | {"prompts": str(file), "out": folder})

    def is_done() -> bool:
        if not (folder / MANIFEST_FILE).exists():
            return False
        dataset = create_dataset(folder, collect.make_manifest(collecting, prompts), force=False)
        return len(dataset.done_units()) == -(-len(prompts) // options.unit)

    def run_it() -> None:
        lines = (json.dumps({"id": p.id, "set": p.set, "prompt": p.text}) + "\n" for p in prompts)
        write_whole(file, "".join(lines).encode())
        if collect.collect(collecting):
            raise KeyboardInterrupt

    return Stage(f"collect {folder.name}", folder, is_done, run_it)


def _content(path: Path) -> dict[str, Any]:
    """A file of the head's folder; empty if it is not there.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"specdecpp: {path} is damaged ({error}); restore it, or remove {path.parent} to train again"
        ) from None


def _is_trained(options: train.TrainOptions) -> bool:
    """Whether the head was trained to its end (its provenance is written last), with these options."""
    made_with = _content(options.out / train.PROVENANCE_FILE).get("options")
    if made_with is None:
        return False
    for name, value in options.model_dump(mode="json", exclude={"data", "out", "force"}).items():
        if made_with.get(name) != value:
            raise ValueError(
                f"specdecpp: {options.out} was trained with {name}={made_with.get(name)!r}, not {value!r}; remove it "
                "to train again, or name another --out"
            )
    return True
