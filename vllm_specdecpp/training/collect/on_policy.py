# SPDX-License-Identifier: Apache-2.0
"""Labels from the engine's own rounds: vLLM answers the prompts with the plugin in recording mode."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_specdecpp.training.collect.options import FEWEST_TOKENS, CollectOptions, PairOptions
from vllm_specdecpp.training.collect.responses import write_responses
from vllm_specdecpp.training.collect.stop_signal import ends_with_children
from vllm_specdecpp.training.collect.units import UnitSummary, encode, shard_path

if TYPE_CHECKING:
    from vllm import LLM

    from vllm_specdecpp.data.prompts import Prompt


def start_engine(options: PairOptions, speculative: Mapping[str, Any], max_num_seqs: int | None = None) -> LLM:
    """A vLLM engine of the pair. While it starts, Ctrl-C and SIGTERM end the process.

    Args:
        options: of the command.
        speculative: keys of the speculative config, beside the draft model and how it samples.
        max_num_seqs: requests at once; by default the options' batch.

    Raises:
        ValueError: one line: the engine did not start.
    """
    from vllm import LLM

    config = {"method": "specdecpp", "model": options.draft, "draft_sample_method": options.draft_sample_method}
    try:
        with ends_with_children():
            return LLM(
                model=options.target,
                speculative_config={**config, **speculative},
                dtype=options.dtype,
                max_model_len=options.max_model_len,
                max_num_seqs=max_num_seqs or options.batch,
                kv_cache_memory_bytes=None if options.kv_cache_mib is None else options.kv_cache_mib << 20,
                enforce_eager=options.eager,
                tensor_parallel_size=options.tensor_parallel_size,
                enable_prefix_caching=False,
                seed=options.seed,
            )
    except RuntimeError as error:  # the engine's own process has said more above
        raise ValueError(f"specdecpp: the engine did not start ({_last_line(error)})") from error


class OnPolicyCollector:
    """Answers prompts with the engine in recording mode.

    Args:
        options: of the command; the dataset in ``out`` must be there.

    Raises:
        ValueError: the engine cannot start with these options.
    """

    def __init__(self, options: CollectOptions) -> None:
        self._options = options
        self._llm = start_engine(options, {"rule": "fixed", "num_speculative_tokens": options.candidates})
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
        write_responses(self._options.out, unit_index, rows)
        owners = {o.request_id: {"id": p.id, "set": p.set} for (p, _), o in zip(fitting, outputs, strict=True)}
        found = self._flush(shard_path(self._options.out, unit_index), owners)
        if found["dropped_rounds"]:
            raise ValueError(
                f"specdecpp: unit={self._options.unit} records more than the engine keeps; lower it, e.g. to "
                f"{max(1, self._options.unit // 2)}"
            )
        return UnitSummary(
            unit=unit_index,
            prompts=len(fitting),
            skipped=len(prompts) - len(fitting),
            tokens=sum(len(row["token_ids"]) for row in rows),
            rounds=found["rounds"],
            steps=found["steps"],
            observed=found["observed"],
            accepted=found["accepted"],
            seconds=time.perf_counter() - start,
        )

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


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
