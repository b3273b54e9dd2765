# SPDX-License-Identifier: Apache-2.0
"""Labels from the engine's own rounds: vLLM answers the prompts with the plugin in recording mode."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_specdecpp.data.prompts import Prompt, encode
from vllm_specdecpp.data.shards import Dataset
from vllm_specdecpp.training.collect.options import FEWEST_TOKENS, CollectOptions, PairOptions
from vllm_specdecpp.training.collect.responses import write_responses
from vllm_specdecpp.training.collect.stop_signal import ends_with_children
from vllm_specdecpp.training.engine import environment, start_engine

if TYPE_CHECKING:
    from vllm import LLM


def start_pair(options: PairOptions, speculative_config: Mapping[str, Any], max_num_seqs: int) -> LLM:
    """An engine of the options' pair. While it starts, Ctrl-C and SIGTERM end the process.

    Raises:
        ValueError: one line: it did not start.
    """
    config = {"model": options.draft, "draft_sample_method": options.draft_sample_method, **speculative_config}
    with ends_with_children():
        return start_engine(
            options.target, config, options, dtype=options.dtype, max_model_len=options.max_model_len,
            max_num_seqs=max_num_seqs, seed=options.seed,
        )  # fmt: skip


@dataclass(frozen=True)
class UnitSummary:
    """What one unit gave."""

    skipped: int
    """Prompts too long for ``max_model_len``."""
    tokens: int
    """Answered."""
    observed: int
    """Candidates with a known outcome."""
    seconds: float
    """Without the start of the engine."""


class OnPolicyCollector:
    """Answers prompts with the engine in recording mode.

    Args:
        options: of the command.
        dataset: to write to.

    Raises:
        ValueError: the engine cannot start with these options.
    """

    def __init__(self, options: CollectOptions, dataset: Dataset) -> None:
        self._options, self._dataset = options, dataset
        config = {"rule": "fixed", "num_speculative_tokens": options.candidates}
        # Model Runner V1 alone records; other engines of this process keep their choice.
        with environment("VLLM_USE_V2_MODEL_RUNNER", "0"):
            self._llm = start_pair(options, config, options.batch)
        self._flush(None, {})  # recording begins

    def collect(self, unit_index: int, prompts: list[Prompt]) -> UnitSummary:
        """Answer one unit's prompts; write its responses, then its shard.

        Raises:
            ValueError: the disk is full, or the unit is too large for the engine's memory.
        """
        start = time.perf_counter()
        encoded = [(p, encode(self._llm.get_tokenizer(), p.text)) for p in prompts]
        longest = self._llm.llm_engine.vllm_config.model_config.max_model_len - FEWEST_TOKENS
        fitting = [(p, ids) for p, ids in encoded if len(ids) <= longest]
        outputs = self._generate(unit_index, [ids for _, ids in fitting])
        rows = []
        for (prompt, ids), output in zip(fitting, outputs, strict=True):
            tokens = list(output.outputs[0].token_ids)
            rows.append({"id": prompt.id, "set": prompt.set, "prompt_token_ids": ids, "token_ids": tokens})
        write_responses(self._dataset.folder, unit_index, rows)
        owners = {o.request_id: {"id": p.id, "set": p.set} for (p, _), o in zip(fitting, outputs, strict=True)}
        found = self._flush(self._dataset.shard_path(unit_index), owners)
        if found["dropped_rounds"]:
            raise ValueError(
                f"specdecpp: unit={self._options.unit} records more than the engine keeps; lower it, e.g. to "
                f"{max(1, self._options.unit // 2)}"
            )
        num_tokens = sum(len(row["token_ids"]) for row in rows)
        return UnitSummary(len(prompts) - len(fitting), num_tokens, found["observed"], time.perf_counter() - start)

    def close(self) -> None:
        """End the engine."""
        self._llm.llm_engine.engine_core.shutdown()

    def _generate(self, unit_index: int, prompts: list[list[int]]) -> list[Any]:
        """vLLM's request outputs, in order."""
        if not prompts:
            return []
        from tqdm import tqdm
        from vllm import SamplingParams

        options = self._options
        params = [
            SamplingParams(
                temperature=options.temperature,
                top_k=options.top_k,
                top_p=options.top_p,
                max_tokens=options.max_tokens,
                # Resuming gives every prompt the seed that it would have had.
                seed=options.seed * 1_000_003 + unit_index * options.unit + i if options.temperature > 0 else None,
                detokenize=False,
            )
            for i in range(len(prompts))
        ]
        bar = functools.partial(tqdm, leave=False, position=1, file=sys.stderr)
        return self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=bar)

    def _flush(self, path: Path | None, prompts: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
        arguments = {"path": None if path is None else str(path.absolute()), "prompts": prompts}
        try:
            return self._llm.collective_rpc("specdecpp_flush_records", kwargs=arguments)[0]
        except Exception as error:  # vLLM wraps what its engine process raises
            _, found, reason = str(error).partition("specdecpp: ")
            if not found:
                raise
            raise ValueError(found + reason.splitlines()[0]) from error
