# SPDX-License-Identifier: Apache-2.0
"""Model Runner V2 with LoRA adapters: one adapter for every row of logits, not for every request.

vLLM 0.32 and 0.33 tell the adapters' kernels of one row of logits per request (``LoraState.make_lora_inputs``), but a
verification has a row for each candidate as well. On GPUs an adapter of the ``lm_head`` then reaches the first rows of
the batch only, whosever they are; the CPU kernels fail. Model Runner V1 counts the rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.lora.request import LoRARequest
from vllm.v1.worker.gpu.lora_utils import LoraState


class RowLoraState(LoraState):
    """Knows how many rows of logits each request has. Made by :func:`count_rows`, never constructed."""

    num_rows: np.ndarray | None  # [num_reqs] of the batch that is about to run

    def make_lora_inputs(
        self, req_ids: list[str], idx_mapping: np.ndarray, num_scheduled_tokens: np.ndarray
    ) -> tuple[tuple[int, ...], tuple[int, ...], set[LoRARequest]]:
        """Adapter of each row of logits, adapter of each token, adapters in use."""
        rows, tokens, requests = super().make_lora_inputs(req_ids, idx_mapping, num_scheduled_tokens)
        if self.num_rows is not None and len(rows) == len(self.num_rows):  # a mended vLLM counts them itself
            rows = tuple(np.repeat(rows, self.num_rows))
        return rows, tokens, requests


def count_rows(runner: Any) -> None:
    """Let vLLM's runner tell the adapters' kernels of every row of logits; a second call changes nothing.

    Args:
        runner: a ``GPUModelRunner`` of Model Runner V2.
    """
    if isinstance(runner.lora_state, RowLoraState):
        return
    state = RowLoraState.__new__(RowLoraState)
    state.__dict__ = runner.lora_state.__dict__
    state.num_rows = None
    prepare_inputs = runner.prepare_inputs

    def prepare_and_count(*args: Any, **kwargs: Any) -> Any:
        batch = prepare_inputs(*args, **kwargs)
        state.num_rows = np.diff(batch.cu_num_logits_np[: batch.num_reqs + 1])
        return batch

    runner.lora_state, runner.prepare_inputs = state, prepare_and_count
