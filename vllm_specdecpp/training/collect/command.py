# SPDX-License-Identifier: Apache-2.0
"""Record which of the draft's tokens the target accepts, as training data for an acceptance head.

The engine answers the prompts and records its own rounds: the states, features and outcomes that the head will meet in
service. The prompts are cut into units; a unit is one shard of the dataset, and what is finished stays when the command
is interrupted.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_specdecpp.training.collect.on_policy import OnPolicyCollector, UnitSummary
from vllm_specdecpp.training.collect.options import CollectOptions
from vllm_specdecpp.training.collect.stop_signal import StopSignal, stop_on_signal
from vllm_specdecpp.training.model_config import model_config

if TYPE_CHECKING:
    from vllm_specdecpp.data.manifest import Manifest
    from vllm_specdecpp.data.prompts import Prompt
    from vllm_specdecpp.data.shards import Dataset


def run(options: CollectOptions) -> int:
    """Carry out the command: see :func:`collect`."""
    collect(options)
    return 0


def collect(options: CollectOptions) -> bool:
    """Collect every unit that is not there yet.

    Returns:
        Whether a first signal came while the last unit was collected.

    Raises:
        ValueError: wrong prompts, models or folder; a full disk. What is finished stays.
        KeyboardInterrupt: the user or the system ended it; between units, after a first signal.
    """
    from vllm_specdecpp.data.prompts import load_prompts
    from vllm_specdecpp.data.shards import create_dataset

    prompts = load_prompts(options.prompts, options.limit, options.split, options.column)
    manifest = make_manifest(options, prompts)
    if options.ray is not None:
        options = with_absolute_paths(options)
    dataset = create_dataset(options.out, manifest, options.force)
    units = {i: prompts[start : start + options.unit] for i, start in enumerate(range(0, len(prompts), options.unit))}
    done = dataset.done_units()
    todo = {unit: chunk for unit, chunk in units.items() if unit not in done}
    if len(todo) < len(units):
        _say(f"{len(units) - len(todo)} of {len(units)} shards are there, going on")
    with stop_on_signal() as stop:
        try:
            _collect_all(options, dataset, todo, len(prompts), stop)
        except Exception as error:
            if stop.requested:  # Ctrl-C reaches the engine's processes too
                raise KeyboardInterrupt from error
            raise
    print(f"{options.out}: {describe(dataset.summary())}")
    return stop.requested


def with_absolute_paths(options: CollectOptions) -> CollectOptions:
    """The options with absolute local paths: a Ray worker has another working directory."""
    changes: dict[str, Any] = {"out": options.out.expanduser().absolute()}
    for name in ("target", "draft"):
        folder = Path(getattr(options, name)).expanduser()
        if folder.is_dir():  # else a hub id
            changes[name] = str(folder.absolute())
    return options.model_copy(update=changes)


def _summaries(
    options: CollectOptions, dataset: Dataset, units: Mapping[int, list[Prompt]]
) -> Generator[tuple[int, UnitSummary]]:  # fmt: skip
    """Each unit as it ends."""
    if options.ray is not None:
        from vllm_specdecpp.training.collect.ray_collect import collect_with_ray

        make = functools.partial(OnPolicyCollector, options, dataset)
        yield from collect_with_ray(units, make, options.ray, gpus_per_worker=options.tensor_parallel_size)
        return
    with contextlib.closing(OnPolicyCollector(options, dataset)) as collector:
        for unit, prompts in units.items():
            yield unit, collector.collect(unit, prompts)


def _collect_all(
    options: CollectOptions, dataset: Dataset, units: Mapping[int, list[Prompt]], num_prompts: int, stop: StopSignal
) -> None:
    """Go through the units with a progress bar of prompts."""
    from tqdm import tqdm

    if not units:
        return
    left = sum(map(len, units.values()))
    tokens = observed = skipped = 0
    seconds = 0.0
    with (
        contextlib.closing(_summaries(options, dataset, units)) as summaries,
        tqdm(total=num_prompts, initial=num_prompts - left, unit="prompt", desc="collect", file=sys.stderr) as bar,
    ):
        for unit, summary in summaries:
            tokens, observed = tokens + summary.tokens, observed + summary.observed
            skipped += summary.skipped
            seconds += summary.seconds / (options.ray or 1)
            bar.update(len(units[unit]))
            bar.set_postfix({"tok/s": f"{tokens / max(seconds, 1e-9):.1f}", "labels": observed})
            if stop.requested and bar.n < num_prompts:
                raise KeyboardInterrupt
    if skipped:
        _say(f"{skipped} prompts were left out: too long for max_model_len")


def make_manifest(options: CollectOptions, prompts: Sequence[Prompt]) -> Manifest:
    """What the dataset of this command says about itself.

    Raises:
        ValueError: a model's config cannot be read.
    """
    from vllm_specdecpp.data.manifest import Manifest
    from vllm_specdecpp.data.prompts import digest
    from vllm_specdecpp.provenance import command_line, git_sha, model_label, model_revision, now, versions

    model_config(options.target, "target")
    sampling: dict[str, Any] = {
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "max_tokens": options.max_tokens,
        "draft_sample_method": options.draft_sample_method,
        "seed": options.seed,
        "dtype": options.dtype,
    }
    return Manifest(
        target=model_label(options.target),
        draft=model_label(options.draft),
        target_revision=model_revision(options.target),
        draft_revision=model_revision(options.draft),
        hidden_size=model_config(options.draft, "draft").get_text_config().hidden_size,
        sampling=sampling,
        num_candidates=options.candidates,
        prompts_digest=digest(prompts),
        num_prompts=len(prompts),
        unit_size=options.unit,
        versions=versions(),
        git=git_sha(),
        command=command_line(),
        created=now(),
    )


def describe(summary: Any) -> str:
    """A dataset's summary in one line."""
    observed = max(summary.observed, 1)
    return (
        f"{summary.prompts} prompts, {summary.rounds} rounds, {summary.observed} labels "
        f"({100 * summary.accepted / observed:.1f} % accepted), {summary.bytes / 2**20:.1f} MiB"
    )


def _say(text: str) -> None:
    print(f"collect: {text}", file=sys.stderr)
