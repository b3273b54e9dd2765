# SPDX-License-Identifier: Apache-2.0
"""Lets the scheduler give a request that has one token to read one row.

vLLM pads a prompt that is cached but for one token to ``1 + num_speculative_tokens`` rows with drafts that nobody made,
so that every request of a step has as many. Ours have different lengths anyway; so the rows are of no use, and vLLM's
counters book the drafts. With a table of lengths by batch size it does not pad: here one that says the same everywhere,
or, where drafts are booked before they are made, less for batches that would book too much.
"""

from __future__ import annotations

from typing import Any

from vllm_specdecpp.engine.shared.logits_memory import lengths_by_batch


def schedule_one_row(vllm_config: Any) -> None:
    """Give the engine such a table (``SpeculativeConfig.num_speculative_tokens_per_batch_size``), unless it has one.

    Call on a whole ``VllmConfig``: while it is made, a table would cost Model Runner V1 its full CUDA graphs.
    """
    speculative = vllm_config.speculative_config
    if speculative.num_speculative_tokens_per_batch_size is None:
        scheduler, longest = vllm_config.scheduler_config, speculative.num_speculative_tokens
        speculative.num_speculative_tokens_per_batch_size = (
            lengths_by_batch(scheduler.max_num_seqs, longest, scheduler.max_num_batched_tokens)
            if scheduler.async_scheduling
            else [(1, scheduler.max_num_seqs, longest)]
        )
