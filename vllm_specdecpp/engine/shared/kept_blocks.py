# SPDX-License-Identifier: Apache-2.0
"""Whether a request keeps all of its draft KV blocks for as long as it runs, and all of them are written here."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from vllm.v1.kv_cache_interface import FullAttentionSpec, RSWASpec, iter_layer_specs


def keeps_all_blocks(vllm_config: Any, kv_cache_config: Any, layer_names: Collection[str]) -> bool:
    """Whether it does, in these layers.

    With sliding windows it does not: its row of the block table may then name blocks that belong to another request by
    now. The draft model must not fall behind there, because it could not write old positions later. With a KV connector
    it must not either: what it has not written yet would come back as if it had been.

    Args:
        vllm_config: of the engine.
        kv_cache_config: of the engine (``vllm.v1.kv_cache_interface.KVCacheConfig``).
        layer_names: the attention layers of the draft model.
    """
    if vllm_config.kv_transfer_config is not None:
        return False
    groups = [group for group in kv_cache_config.kv_cache_groups if set(layer_names) & set(group.layer_names)]
    specs = [spec for group in groups for spec in iter_layer_specs(group.kv_cache_spec)]
    return all(isinstance(spec, FullAttentionSpec) and not isinstance(spec, RSWASpec) for spec in specs)
