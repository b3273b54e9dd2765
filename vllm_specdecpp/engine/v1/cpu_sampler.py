# SPDX-License-Identifier: Apache-2.0
"""Mends vLLM's CPU rejection sampler at temperature > 0 (vLLM 0.32 and 0.33, see ``docs/upstream``).

``vllm.utils.cpu_triton_utils._expand_kernel_impl`` converts its output to int64 first; for float tensors that is a
copy, so temperature, top-k and top-p of draft rows stay uninitialised memory.
"""

from __future__ import annotations

import torch

KERNEL = "vllm.v1.sample.rejection_sampler.expand_kernel"


def expand(
    output_ptr: torch.Tensor,  # [num_tokens]
    input_ptr: torch.Tensor,  # [num_reqs]
    cu_num_tokens_ptr: torch.Tensor,  # [num_reqs] inclusive cumulative counts
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int | None = None,
) -> None:
    """Repeat each request's value for each of its tokens, into ``output_ptr`` itself, replacing one value."""
    counts = torch.diff(cu_num_tokens_ptr.long(), prepend=cu_num_tokens_ptr.new_zeros(1, dtype=torch.long))
    values = torch.where(input_ptr == replace_from, torch.full_like(input_ptr, replace_to), input_ptr)
    output_ptr.copy_(values.repeat_interleave(counts))


def is_broken() -> bool:
    """Whether this vLLM loses float values in ``expand_batch_to_tokens`` (tried on a two-row example)."""
    from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

    values = torch.tensor([0.5, 2.0])
    expanded = expand_batch_to_tokens(values, torch.tensor([1, 3], dtype=torch.int32), 3)
    return expanded.tolist() != [0.5, 2.0, 2.0]


def apply() -> bool:
    """Replace the kernel through vLLM's own registry if it is broken; True if it was replaced."""
    if not is_broken():
        return False
    from vllm.triton_utils.dispatcher import register_kernels

    register_kernels({KERNEL: expand})
    if is_broken():
        raise RuntimeError("specdecpp: vLLM's CPU rejection sampler could not be mended; use temperature 0")
    return True
