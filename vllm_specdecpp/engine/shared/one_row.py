# SPDX-License-Identifier: Apache-2.0
"""Lets the scheduler give a request that has one token to read one row.

vLLM pads a prompt that is cached but for one token to ``1 + num_speculative_tokens`` rows with drafts that nobody made,
so that every request of a step has as many. Ours have different lengths anyway; so the rows are of no use, and vLLM's
counters book the drafts. With a table of lengths by batch size it does not pad: here one that says the same everywhere.
"""

from __future__ import annotations

from typing import Any


def schedule_one_row(vllm_config: Any) -> None:
    """Give the engine such a table (``SpeculativeConfig.num_speculative_tokens_per_batch_size``), unless it has one.

    Call on a whole ``VllmConfig``: while it is made, a table would cost Model Runner V1 its full CUDA graphs.
    """
    speculative = vllm_config.speculative_config
    if speculative.num_speculative_tokens_per_batch_size is None:
        widest = vllm_config.scheduler_config.max_num_seqs
        speculative.num_speculative_tokens_per_batch_size = [(1, widest, speculative.num_speculative_tokens)]
