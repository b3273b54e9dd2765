# SPDX-License-Identifier: Apache-2.0
"""What passes of a pair cost on this machine: an engine with the default rule answers a few prompts, one at a time."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_specdecpp.data.prompts import Prompt, encode
from vllm_specdecpp.training.collect.on_policy import start_pair
from vllm_specdecpp.training.collect.options import PairOptions
from vllm_specdecpp.training.engine import costs_of

if TYPE_CHECKING:
    from vllm_specdecpp.costs.model import Points

NUM_PROMPTS = 8
"""Answered: the engine adds what a round takes beside its passes once it has seen 8 rounds."""


def measure_costs(options: PairOptions, prompts: Sequence[Prompt]) -> Points:
    """Start an engine, and ask it what its passes cost.

    Args:
        options: of the pair.
        prompts: of which the first few that fit are answered.

    Raises:
        ValueError: one line: the engine did not start.
    """
    from tqdm import tqdm
    from vllm import SamplingParams

    llm = start_pair(options, {}, 1)
    try:
        params = SamplingParams(
            temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, max_tokens=options.max_tokens,
            ignore_eos=True, detokenize=False,
        )  # fmt: skip
        longest = llm.llm_engine.vllm_config.model_config.max_model_len - options.max_tokens
        ids = [encode(llm.get_tokenizer(), prompt.text) for prompt in prompts]
        bar = functools.partial(tqdm, desc="costs", file=sys.stderr)
        fitting = [{"prompt_token_ids": each} for each in ids if len(each) <= longest][:NUM_PROMPTS]
        llm.generate(fitting, params, use_tqdm=bar)
        return costs_of(llm)
    finally:
        llm.llm_engine.engine_core.shutdown()
