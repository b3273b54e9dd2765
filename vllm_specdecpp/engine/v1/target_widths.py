# SPDX-License-Identifier: Apache-2.0
"""Runs the target's verification at the cheapest measured width, on CPUs.

Without this a round of one candidate (two rows) can cost more than one of four. The extra rows are vLLM's own padding,
as for CUDA graphs: their slot is -1, so no KV is written, and their hidden states are cut off.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import set_forward_context

from vllm_specdecpp.engine.shared.widths import MAX_ROWS, RowWidths, measure

_METHOD = "_determine_batch_execution_and_padding"


def can_pad(runner: Any) -> bool:
    """Whether padded rows are known to be harmless: text models without LoRA (its kernels count the tokens)."""
    return runner.vllm_config.lora_config is None and not runner.supports_mm_inputs


@torch.inference_mode()
def measure_target(runner: Any) -> list[float]:
    """Median seconds of the target's pass over 1, 2, ... rows, without attention (``GPUModelRunner.model``)."""

    def run(num_rows: int) -> None:
        with set_forward_context(None, runner.vllm_config, num_tokens=num_rows):
            runner.model(input_ids=runner.input_ids.gpu[:num_rows], positions=runner.positions[:num_rows])

    return measure(run, min(MAX_ROWS, runner.max_num_tokens))


def pad_to(runner: Any, widths: RowWidths) -> None:
    """Make the runner pad small batches (``GPUModelRunner._determine_batch_execution_and_padding``); again replaces."""
    unpad(runner)
    original = getattr(runner, _METHOD)

    def determine(*args: Any, **kwargs: Any) -> Any:
        mode, descriptor, *rest = original(*args, **kwargs)
        wider = widths.cheapest(descriptor.num_tokens)
        if mode == CUDAGraphMode.NONE and wider > descriptor.num_tokens:
            descriptor = dataclasses.replace(descriptor, num_tokens=wider)
        return (mode, descriptor, *rest)

    setattr(runner, _METHOD, determine)


def unpad(runner: Any) -> None:
    """Give the runner its own method back."""
    runner.__dict__.pop(_METHOD, None)
