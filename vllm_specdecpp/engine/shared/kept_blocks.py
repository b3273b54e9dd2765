# SPDX-License-Identifier: Apache-2.0
"""Whether a request keeps all of its draft KV blocks for as long as it runs."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from vllm.v1.kv_cache_interface import FullAttentionSpec, RSWASpec, iter_layer_specs


def keeps_all_blocks(kv_cache_config: Any, layer_names: Collection[str]) -> bool:
    """Whether it does, in these layers. Else, as with sliding windows, a row of the block table may name blocks that
    are another's by now, so that nothing old may be read anew: the draft model must not fall behind.

    Args:
        kv_cache_config: of the engine (``vllm.v1.kv_cache_interface.KVCacheConfig``).
        layer_names: the attention layers of the draft model.
    """
    groups = [group for group in kv_cache_config.kv_cache_groups if set(layer_names) & set(group.layer_names)]
    specs = [spec for group in groups for spec in iter_layer_specs(group.kv_cache_spec)]
    return all(isinstance(spec, FullAttentionSpec) and not isinstance(spec, RSWASpec) for spec in specs)
