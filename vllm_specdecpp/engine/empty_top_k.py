# SPDX-License-Identifier: Apache-2.0
"""Mends top-k without top-p beside speculation where there is no Triton (vLLM 0.32 and 0.33, see ``docs/upstream``).

With speculation Model Runner V1 calls the rejection sampler in every step, also when no candidate was drafted, as in a
prefill. ``vllm.v1.sample.ops.topk_topp_sampler.apply_top_k_only`` then takes the maximum of an empty tensor: it raises,
and the engine ends.
"""

from __future__ import annotations

import functools

import torch


def is_broken() -> bool:
    """Whether this vLLM's top-k fails on no rows (tried)."""
    from vllm.v1.sample.ops import topk_topp_sampler

    try:
        topk_topp_sampler.apply_top_k_only(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int32))
    except RuntimeError:
        return True
    return False


def apply() -> bool:
    """Wrap the function if it is broken; True if it was wrapped. A second call finds nothing to do."""
    if not is_broken():
        return False
    from vllm.v1.sample.ops import topk_topp_sampler

    original = topk_topp_sampler.apply_top_k_only

    @functools.wraps(original)
    def apply_top_k_only(logits: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return original(logits, k) if logits.shape[0] else logits

    topk_topp_sampler.apply_top_k_only = apply_top_k_only
    return True
