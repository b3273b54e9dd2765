# SPDX-License-Identifier: Apache-2.0
"""The target's own continuations, which the paper's recipe labels: from another dataset, or generated with vLLM."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_specdecpp.training.collect.on_policy import start_engine
from vllm_specdecpp.training.collect.units import encode, write_responses

if TYPE_CHECKING:
    from vllm_specdecpp.data.prompts import Prompt
    from vllm_specdecpp.training.collect.options import CollectOptions

SEED_STRIDE = 1_000_003
"""Between the seeds of two runs: more prompts than any run has."""


def responses_path(folder: Path, unit: int) -> Path:
    """Where the responses of a unit lie, or go."""
    return folder / "responses" / f"{unit:05d}.jsonl"


def read_responses(path: Path) -> list[dict[str, Any]]:
    """The rows of one unit's ``responses/NNNNN.jsonl``: ``{"id", "set", "prompt_token_ids", "token_ids"}``.

    Raises:
        ValueError: one line naming the file: it is damaged.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            row = json.loads(line)
            rows.append({key: row[key] for key in ("id", "set", "prompt_token_ids", "token_ids")})
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"specdecpp: {path}, line {number}, is damaged; remove the file and run the same command again"
            ) from None
    return rows


def responses_of(folder: Path, target: str) -> dict[str, dict[str, Any]]:
    """Prompt id → its response in another dataset.

    Raises:
        ValueError: one line: no dataset, another target's, or one without responses.
    """
    from vllm_specdecpp.data.shards import open_dataset

    theirs = open_dataset(folder).manifest.target
    if theirs.rsplit("/", 1)[-1].lower() != target.rsplit("/", 1)[-1].lower():
        raise ValueError(
            f"specdecpp: responses={str(folder)!r} are of target {theirs!r}, not of {target!r}; give a dataset of "
            "this target"
        )
    rows = {row["id"]: row for path in sorted((folder / "responses").glob("*.jsonl")) for row in read_responses(path)}
    if not rows:
        raise ValueError(f"specdecpp: responses={str(folder)!r} holds no responses; collect them, or leave it out")
    return rows


def pick_responses(
    given: Mapping[str, dict[str, Any]], prompts: Sequence[Prompt], tokenizer: Any, source: Path
) -> list[dict[str, Any]]:
    """The responses to ``prompts`` among ``given``; a prompt that was left out there is left out here.

    Raises:
        ValueError: one line: none is there, or another prompt bears the same id.
    """
    rows = []
    for prompt in prompts:
        row = given.get(prompt.id)
        if row is None:
            continue
        if row["prompt_token_ids"] != encode(tokenizer, prompt.text):
            raise ValueError(
                f"specdecpp: responses={str(source)!r} answers another prompt under the id {prompt.id!r}; give the "
                "prompts that it was made with"
            )
        rows.append(row)
    if not rows:
        raise ValueError(
            f"specdecpp: responses={str(source)!r} answers none of the prompts from {prompts[0].id!r} on; give the "
            "prompts that it was made with"
        )
    return rows


def generate_responses(options: CollectOptions, units: Mapping[int, Sequence[Prompt]]) -> None:
    """Let the target alone answer the prompts of some units, and write each unit's responses; then end the engine.

    A prompt that is too long for the engine gets no response.

    Raises:
        ValueError: the engine cannot start with these options, or the disk is full.
    """
    from tqdm import tqdm
    from vllm import SamplingParams

    llm = start_engine(options, None)
    try:
        longest = llm.llm_engine.vllm_config.model_config.max_model_len - 1
        for unit, prompts in units.items():
            encoded = [(i, p, encode(llm.get_tokenizer(), p.text)) for i, p in enumerate(prompts)]
            fitting = [(i, p, ids) for i, p, ids in encoded if len(ids) <= longest]
            params = [
                SamplingParams(
                    temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
                    max_tokens=options.max_tokens, detokenize=False,
                    # Resuming gives every prompt the seed that it would have had.
                    seed=options.seed * SEED_STRIDE + unit * options.unit + i if options.temperature > 0 else None,
                )
                for i, _, _ in fitting
            ]  # fmt: skip
            inputs: Any = [{"prompt_token_ids": ids} for _, _, ids in fitting]
            bar = functools.partial(tqdm, leave=False, file=sys.stderr, desc=f"responses, shard {unit}")
            outputs = llm.generate(inputs, params, use_tqdm=bar) if inputs else []
            rows = [
                {"id": p.id, "set": p.set, "prompt_token_ids": ids, "token_ids": list(o.outputs[0].token_ids)}
                for (_, p, ids), o in zip(fitting, outputs, strict=True)
            ]
            write_responses(options.out, unit, rows)
    finally:
        llm.llm_engine.engine_core.shutdown()
