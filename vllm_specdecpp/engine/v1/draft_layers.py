# SPDX-License-Identifier: Apache-2.0
"""Models in which only some layers have a sliding window (Gemma 2 and 3, gpt-oss), on Model Runner V1.

Its proposer is given one set of attention metadata, that of the first kind of KV: with two kinds in either model the
draft would write into blocks of the target. vLLM can keep the KV of sliding layers as if they were full ones: more
memory, the same attention.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("vllm.specdecpp")

_CAN_BE_KEPT_ALIKE = {"full_attention", "sliding_attention", "chunked_attention"}
"""``layer_types`` of a Hugging Face configuration."""


def refusal(model: str) -> str:
    """The error's line."""
    return (
        f"specdecpp: model={model!r} and its target keep more than one kind of KV, which Model Runner V1 cannot draft "
        "with; set VLLM_USE_V2_MODEL_RUNNER=1, or choose other models"
    )


def worded(validate: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """``validate_same_kv_cache_group`` with its assertion as an error that says what to do, for configurations that
    do not list their layers."""

    @functools.wraps(validate)
    def validate_same_kv_cache_group(self: Any, kv_cache_config: Any) -> None:
        try:
            validate(self, kv_cache_config)
        except AssertionError:
            raise ValueError(refusal(self.config.model)) from None
        names = set(self._draft_attn_layer_names)
        if any(names & set(group.layer_names) for group in kv_cache_config.kv_cache_groups[1:]):
            raise ValueError(refusal(self.config.model))  # the blocks that it is given are the first group's

    return validate_same_kv_cache_group


def keep_alike(vllm_config: Any) -> None:
    """Turn vLLM's hybrid KV cache manager off if the two models keep more than one kind of KV.

    Raises:
        ValueError: one line: layers that cannot be kept alike, or the user asked for the manager.
    """
    draft, scheduler = vllm_config.speculative_config.draft_model_config, vllm_config.scheduler_config
    configs = draft.hf_text_config, vllm_config.model_config.hf_text_config
    # Where they are not listed, all layers see everything, unless vLLM finds out otherwise (``worded``).
    kinds = {kind for config in configs for kind in getattr(config, "layer_types", None) or ("full_attention",)}
    if vllm_config.use_v2_model_runner or len(kinds) < 2 or scheduler.disable_hybrid_kv_cache_manager:
        return
    if not kinds <= _CAN_BE_KEPT_ALIKE or vllm_config.model_config.is_hybrid:
        raise ValueError(refusal(draft.model))
    scheduler.disable_hybrid_kv_cache_manager = True
    logger.info(
        "specdecpp: only some layers of %s and its target have a sliding window: the KV of all is kept (as with "
        "--disable-hybrid-kv-cache-manager), which takes more memory",
        draft.model,
    )
