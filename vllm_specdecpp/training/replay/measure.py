# SPDX-License-Identifier: Apache-2.0
"""Time this machine's rounds in the real engine: drafting by candidate length, verification by width, no speculation.

Example: vllm-specdecpp measure --target MODEL --draft MODEL --prompts prompts.jsonl --out costs.json
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from vllm_specdecpp.provenance import command_line, hardware, model_label, versions
from vllm_specdecpp.training.collect.units import encode
from vllm_specdecpp.training.options import CommandOptions
from vllm_specdecpp.training.replay.costs import Costs, check_free

_WARM_UP_TOKENS = 8
_KEPT_STEPS = 100_000
_MAX_MODEL_LEN = 1024


class MeasureOptions(CommandOptions):
    """Measure the step costs that tune needs, in the real engine at fixed candidate lengths.

    The lengths take turns on every prompt, so a slow moment of the machine hits all alike; medians are kept. Prompts
    are read and steps are timed with speculation off, in an engine of its own, for the ratio over it.
    """

    target: str = Field(min_length=1)
    """Target model: a folder or a hub id."""

    draft: str = Field(min_length=1)
    """Draft model: a folder or a hub id."""

    prompts: str = Field(min_length=1)
    """Prompts: a .jsonl or .txt file, or a Hugging Face dataset id."""

    out: Path
    """The costs file to write, e.g. costs.json."""

    lengths: list[int] = [1, 2, 3, 4, 5, 6, 8, 10, 12]
    """Candidate lengths to measure; costs between them are interpolated, beyond them extrapolated."""

    rounds_each: int = Field(default=60, ge=2)
    """Rounds to time at each length."""

    max_tokens: int = Field(default=96, ge=1)
    """Tokens generated for each prompt and length."""

    num_prompts: int = Field(default=16, ge=1)
    """How many prompts to take turns on."""

    batch: int = Field(default=1, ge=1)
    """Requests that run together."""

    max_model_len: int | None = Field(default=None, ge=16)
    """Longest sequence in tokens, prompt included; by default 1024, or less if the models' own bound is."""

    kv_cache_mib: int | None = Field(default=None, ge=1)
    """Memory of the KV cache; by default vLLM decides."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of both models."""

    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs that the models are spread over."""

    eager: bool = False
    """Do not compile the models: a faster start, slower steps; measure what you will serve."""

    seed: int = 0
    """The engine's."""

    force: bool = False
    """Replace the costs file."""


@dataclass
class Samples:
    """Timed steps of one candidate length, in seconds."""

    draft: list[float] = field(default_factory=list)
    verify: list[float] = field(default_factory=list)

    def take(self, steps: Sequence[dict[str, Any]], length: int, batch: int) -> None:
        """Keep the whole rounds of ``length`` among the engine's step times; prefill and cut rounds are left out.

        Args:
            steps: of ``specdecpp_step_times``.
        """
        for step in steps:
            if step["num_new"] or step["num_reqs"] != batch:
                continue
            if step["passes"] == length:
                self.draft.append(step["draft_seconds"])
            if step["rows"] == batch * (length + 1) and step["since_last_seconds"] is not None:
                self.verify.append(step["since_last_seconds"])

    @property
    def num_rounds(self) -> int:
        """Rounds of which both parts were timed."""
        return min(len(self.draft), len(self.verify))


def run(options: MeasureOptions) -> int:
    """Carry out the command.

    Raises:
        ValueError: one line: a bad option, unreadable prompts, or an output that exists.
    """
    check_options(options)
    if options.max_model_len is None:
        options = options.model_copy(update={"max_model_len": default_max_model_len(options)})
        check_options(options)
    from vllm_specdecpp.data.prompts import load_prompts

    prompts = [prompt.text for prompt in load_prompts(options.prompts, options.num_prompts)]
    with _engine(options, None) as llm:
        batches = _batches(llm, prompts, options)
        off = time_off(llm, batches, options)
    speculative_config = {
        "method": "specdecpp", "model": options.draft, "rule": "fixed", "num_speculative_tokens": max(options.lengths),
        "trace_rounds": _KEPT_STEPS,
    }  # fmt: skip
    with _engine(options, speculative_config) as llm:
        samples = time_rounds(llm, batches, options)
    costs = summarize(samples, off, options)
    costs.save(options.out, options.force)
    print(report(costs))
    for doubt in costs.doubts():
        print(f"warning: {doubt}; measure with nothing else running, or raise rounds_each", file=sys.stderr)
    return 0


def check_options(options: MeasureOptions) -> None:
    """Refuse what cannot be measured, before an engine starts.

    Raises:
        ValueError: one line.
    """
    check_free(options.out, options.force)
    lengths = options.lengths
    if len(set(lengths)) < 2 or min(lengths) < 1 or max(lengths) > 128 or len(set(lengths)) < len(lengths):
        raise ValueError(f"specdecpp: lengths={lengths} must be two or more different whole numbers from 1 to 128")
    needed = 3 * (max(lengths) + 1)
    if options.max_tokens < needed:
        raise ValueError(
            f"specdecpp: max_tokens={options.max_tokens} leaves no whole rounds of {max(lengths)} candidates; "
            f"give at least {needed}"
        )
    if options.max_model_len is not None and options.max_tokens >= options.max_model_len:
        raise ValueError(
            f"specdecpp: max_tokens={options.max_tokens} leaves no room for a prompt in "
            f"max_model_len={options.max_model_len}; lower the first or raise the second"
        )


def default_max_model_len(options: MeasureOptions) -> int:
    """Both models' bound on a sequence, ``_MAX_MODEL_LEN`` at most: a longer one only costs memory here.

    Raises:
        ValueError: one line: a model's config cannot be read.
    """
    from vllm_specdecpp.training.model_config import model_config

    configs = [model_config(getattr(options, name), name).get_text_config() for name in ("target", "draft")]
    bounds = [getattr(config, "max_position_embeddings", None) for config in configs]
    return min([_MAX_MODEL_LEN, *(bound for bound in bounds if bound)])


def time_rounds(llm: Any, batches: Sequence[list[list[int]]], options: MeasureOptions) -> dict[int, Samples]:
    """Time whole rounds at every length, the lengths taking turns on each batch of prompts.

    Args:
        llm: an engine with rule "fixed" that keeps its step times.

    Raises:
        ValueError: no whole round of some length came in a turn over all prompts.
    """
    lengths = sorted(options.lengths)
    for length in lengths:
        _configure(llm, length)
        _generate(llm, batches[0], max(_WARM_UP_TOKENS, 2 * length), options.seed)
    samples = {length: Samples() for length in lengths}
    with _progress("rounds timed", options.rounds_each * len(lengths)) as advance:
        turn = 0
        while open_lengths := [k for k in lengths if samples[k].num_rounds < options.rounds_each]:
            start = turn % len(open_lengths)
            for length in open_lengths[start:] + open_lengths[:start]:
                before = min(samples[length].num_rounds, options.rounds_each)
                _configure(llm, length)
                llm.collective_rpc("specdecpp_step_times", kwargs={"clear": True})
                _generate(llm, batches[turn % len(batches)], options.max_tokens, options.seed)
                steps = llm.collective_rpc("specdecpp_step_times", kwargs={"clear": True})[0]
                samples[length].take(steps, length, options.batch)
                advance(min(samples[length].num_rounds, options.rounds_each) - before)
            turn += 1
            missing = [length for length in lengths if not samples[length].num_rounds]
            if missing and turn >= len(batches):
                raise ValueError(
                    f"specdecpp: no whole round of {missing[0]} candidates in {options.max_tokens} tokens of "
                    f"{len(batches)} batches; raise max_tokens, or lower lengths or batch={options.batch}"
                )
    return samples


def time_off(llm: Any, batches: Sequence[list[list[int]]], options: MeasureOptions) -> list[float]:
    """Seconds between the tokens of a request without speculation, prefill left out; at least ``rounds_each``."""
    _generate(llm, batches[0], _WARM_UP_TOKENS, options.seed)
    seconds: list[float] = []
    turn = 0
    with _progress("tokens timed with speculation off", options.rounds_each) as advance:
        while len(seconds) < options.rounds_each:
            found = _gaps(llm, batches[turn % len(batches)], f"off-{turn}", options)
            if not found:
                raise ValueError(
                    f"specdecpp: no step of the engine served batch={options.batch} requests at once; lower it, or "
                    "raise kv_cache_mib"
                )
            advance(min(len(found), options.rounds_each - len(seconds)))
            seconds += found
            turn += 1
    return seconds


def _gaps(llm: Any, batch: Sequence[list[int]], name: str, options: MeasureOptions) -> list[float]:
    """Time between two steps that both emitted a token for the whole batch."""
    params = _sampling(options.max_tokens, options.seed)
    for index, ids in enumerate(batch):
        llm.llm_engine.add_request(f"{name}-{index}", {"prompt_token_ids": ids}, params)
    seconds: list[float] = []
    last: float | None = None
    while llm.llm_engine.has_unfinished_requests():
        full = len(llm.llm_engine.step()) == len(batch)
        now = time.perf_counter()
        if full and last is not None:
            seconds.append(now - last)
        last = now if full else None
    # The first gap may hold the rest of the prefill's work.
    return seconds[1:]


def summarize(samples: dict[int, Samples], off: Sequence[float], options: MeasureOptions) -> Costs:
    """Medians, and the quartiles around them."""
    draft = {k: s.draft for k, s in samples.items()}
    verify = {k + 1: s.verify for k, s in samples.items()}
    return Costs(
        draft_seconds={k: statistics.median(values) for k, values in draft.items()},
        verify_seconds={k: statistics.median(values) for k, values in verify.items()},
        off_seconds=statistics.median(off),
        batch=options.batch,
        machine=hardware(),
        versions=versions(),
        command=command_line(),
        target=model_label(options.target),
        draft_model=model_label(options.draft),
        quartiles={
            "draft_seconds": {str(k): _quartiles(values) for k, values in draft.items()},
            "verify_seconds": {str(k): _quartiles(values) for k, values in verify.items()},
            "off_seconds": {"1": _quartiles(off)},
        },
        num_samples={
            "draft_seconds": {str(k): len(values) for k, values in draft.items()},
            "verify_seconds": {str(k): len(values) for k, values in verify.items()},
            "off_seconds": {"1": len(off)},
        },
    )


def report(costs: Costs) -> str:
    """The costs as a table."""
    lines = ["| candidates | draft ms (25-75 %) | verify ms (25-75 %) | rounds |", "|---|---|---|---|"]
    for k in sorted(costs.draft_seconds):
        cells = [
            f"{1000 * curve[x]:.1f} ({1000 * low:.1f}-{1000 * high:.1f})"
            for curve, name, x in (
                (costs.draft_seconds, "draft_seconds", k),
                (costs.verify_seconds, "verify_seconds", k + 1),
            )
            for low, high in (costs.quartiles[name][str(x)],)
        ]
        lines.append(f"| {k} | {cells[0]} | {cells[1]} | {costs.num_samples['draft_seconds'][str(k)]} |")
    lines.append(f"\nWithout speculation: {1000 * costs.off_seconds:.1f} ms per token.")
    return "\n".join(lines)


def _quartiles(values: Sequence[float]) -> list[float]:
    if len(values) < 2:
        return [values[0], values[0]]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def _batches(llm: Any, prompts: Sequence[str], options: MeasureOptions) -> list[list[list[int]]]:
    """Token ids of the prompts in the target's chat template, cut to the room they have, in batches.

    The last prompts that fill no batch are left out; too few prompts for one are repeated.
    """
    room = llm.llm_engine.vllm_config.model_config.max_model_len - options.max_tokens - 1
    ids = [encode(llm.get_tokenizer(), prompt)[-room:] for prompt in prompts]
    while len(ids) < options.batch:
        ids += ids
    return [ids[i : i + options.batch] for i in range(0, len(ids) - options.batch + 1, options.batch)]


def _sampling(max_tokens: int, seed: int) -> Any:
    from vllm import SamplingParams

    # An end token would only cost samples: what a step costs does not depend on what is said.
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, seed=seed)


def _generate(llm: Any, batch: Sequence[list[int]], max_tokens: int, seed: int) -> None:
    llm.generate([{"prompt_token_ids": ids} for ids in batch], _sampling(max_tokens, seed), use_tqdm=False)


def _configure(llm: Any, length: int) -> None:
    llm.collective_rpc("specdecpp_configure", kwargs={"rule": "fixed", "num_speculative_tokens": length})


@contextmanager
def _engine(options: MeasureOptions, speculative_config: dict[str, Any] | None) -> Iterator[Any]:
    """An engine, ended when the block is left: two would share the memory and the cores."""
    from vllm import LLM

    what = "speculation on" if speculative_config else "speculation off"
    print(f"starting the engine, {what} ...", file=sys.stderr, flush=True)
    try:
        llm = LLM(
            model=options.target,
            speculative_config=speculative_config,
            dtype=options.dtype,
            tensor_parallel_size=options.tensor_parallel_size,
            max_model_len=options.max_model_len,
            max_num_seqs=options.batch,
            kv_cache_memory_bytes=None if options.kv_cache_mib is None else options.kv_cache_mib << 20,
            enforce_eager=options.eager,
            enable_prefix_caching=False,
            seed=options.seed,
        )
    except RuntimeError as error:  # the engine's own process has said more above
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise ValueError(f"specdecpp: the engine, {what}, did not start ({reason})") from error
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":  # the engine lived in this process
            from vllm.distributed import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()
        gc.collect()


@contextmanager
def _progress(unit: str, total: int) -> Iterator[Callable[[int], object]]:
    """A bar on stderr; gives the function that moves it on."""
    from tqdm import tqdm

    with tqdm(total=total, desc=unit, file=sys.stderr) as bar:
        yield bar.update
