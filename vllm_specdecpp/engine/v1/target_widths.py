# SPDX-License-Identifier: Apache-2.0
"""Runs the target's verification at the cheapest measured width, on CPUs.

Without this a round of one candidate (two rows) can cost more than one of four. The extra rows are vLLM's own padding,
as for CUDA graphs: their slot is -1, so no KV is written, and their hidden states are cut off. It is done where the
target's pass can be timed alone: not with LoRA, whose kernels count the tokens, nor where it takes more than token ids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from vllm.config import CUDAGraphMode

from vllm_specdecpp.costs.widths import padded

_METHOD = "_determine_batch_execution_and_padding"


def pad_to(runner: Any, rows: Sequence[int]) -> None:
    """Make the runner pad small batches (``GPUModelRunner._determine_batch_execution_and_padding``); again replaces."""
    unpad(runner)
    original = getattr(runner, _METHOD)

    def determine(*args: Any, **kwargs: Any) -> Any:
        mode, descriptor, *rest = original(*args, **kwargs)
        wider = padded(rows, descriptor.num_tokens)
        if mode == CUDAGraphMode.NONE and wider > descriptor.num_tokens:
            descriptor = dataclasses.replace(descriptor, num_tokens=wider)
        return (mode, descriptor, *rest)

    setattr(runner, _METHOD, determine)


def unpad(runner: Any) -> None:
    """Give the runner its own method back."""
    runner.__dict__.pop(_METHOD, None)
