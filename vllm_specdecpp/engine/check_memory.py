# SPDX-License-Identifier: Apache-2.0
"""What a pair takes of the memory, as far as configurations and files tell before anything is loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1}
"""Bytes of an entry by its type in a safetensors header."""
_CAST = ("F32", "F16", "BF16")
"""Types that vLLM loads as the model's own."""


def memory(vllm_config: Any) -> dict[str, str]:
    """What the pair takes on each device, and what is there.

    Raises:
        ValueError: one line: it does not fit, with what to change.
    """
    from vllm_specdecpp.engine.gpu_defaults import memory_of

    target, draft = vllm_config.model_config, vllm_config.speculative_config.draft_model_config
    parallel, logits = vllm_config.parallel_config, memory_of(vllm_config)
    weights: list[int | None] = [weight_bytes(target, parallel.tensor_parallel_size), 0]
    tokens = [token_bytes(target, vllm_config), 0]
    if draft is not target:  # else there is no draft model (`engine.options`)
        weights[1], tokens[1] = weight_bytes(draft, parallel.tensor_parallel_size), token_bytes(draft, vllm_config)
    free, room, for_kv = _room(vllm_config)
    found = {
        "weights of the target": _shown(weights[0]),
        "weights of the draft": _shown(weights[1]),
        "logits of a round": _shown(logits.draft + logits.verification),
        "KV of a token": f"{tokens[0] / 1024:.1f} KiB, and {tokens[1] / 1024:.1f} KiB of the draft",
        "free": _shown(free),
        "vLLM may use": _shown(room),
    }
    taken = sum(size or 0 for size in weights)
    if for_kv is None:  # what is left
        taken += logits.draft + logits.verification
        for_kv = max(room - taken, 0)
    if taken > room:
        raise ValueError(
            f"specdecpp: weights and logits take {_shown(taken)} of {_shown(room)}; take a smaller draft, more GPUs "
            "(--tensor-parallel-size), or raise --gpu-memory-utilization"
        )
    fits = int(for_kv // sum(tokens))
    # Fewer layers may hold all of a request's tokens, or vLLM may fit the length itself.
    whole = target.get_sliding_window() is None and not target.is_hybrid
    if whole and fits < target.max_model_len and target.original_max_model_len != -1:
        raise ValueError(
            f"specdecpp: {_shown(for_kv)} for KV hold {fits} tokens of both models, fewer than max_model_len="
            f"{target.max_model_len}; lower --max-model-len, or give more memory"
        )
    more = "" if None not in weights else " if the weights, which are not here yet, leave room"
    return found | {"for KV": f"{_shown(for_kv)}, {'' if whole else 'at least '}{fits} tokens{more}"}


def _shown(size: int | None) -> str:
    if size is None:
        return "not known before the files are here"
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _room(vllm_config: Any) -> tuple[int, int, int | None]:
    """Bytes that are free, that vLLM may use, and that it sets aside for KV, if that does not depend on the rest."""
    from vllm.platforms import current_platform

    cache = vllm_config.cache_config
    if current_platform.is_cpu():
        import psutil

        there = psutil.virtual_memory()
        if cache.kv_cache_memory_bytes is not None:
            return there.available, there.available, cache.kv_cache_memory_bytes
        wanted = math.ceil(there.total * cache.gpu_memory_utilization)
        if wanted > there.available:
            raise ValueError(
                f"specdecpp: vLLM wants gpu_memory_utilization={cache.gpu_memory_utilization} of {_shown(there.total)} "
                f"on a CPU too, but {_shown(there.available)} are free; lower --gpu-memory-utilization, or give "
                "--kv-cache-memory-bytes"
            )
        return there.available, wanted, None
    import torch

    free, total = torch.accelerator.get_memory_info()
    return free, min(free, int(total * cache.gpu_memory_utilization)), cache.kv_cache_memory_bytes


def token_bytes(model: Any, vllm_config: Any) -> int:
    """KV cache of one token on each device, as if every layer kept all of them; ``model``: a vLLM ``ModelConfig``."""
    parallel, dtype = vllm_config.parallel_config, vllm_config.cache_config.cache_dtype
    itemsize = 1 if str(dtype).startswith("fp8") else model.dtype.itemsize
    entries = model.get_num_kv_heads(parallel) * model.get_head_size() * (1 if model.use_mla else 2)
    return int(model.get_num_layers(parallel) * entries * itemsize)


def weight_bytes(model: Any, num_shards: int) -> int | None:
    """Of a model on each device, by the headers of its safetensors; None if they are not on this machine."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(model.model).expanduser()
    if not folder.is_dir():
        found = try_to_load_from_cache(model.model, "config.json", revision=model.revision)
        if not isinstance(found, str):
            return None
        folder = Path(found).parent
    total = 0
    for kind, entries in _tensors(folder):
        cast = kind in _CAST and model.quantization is None
        total += entries * (model.dtype.itemsize if cast else _SIZES.get(kind, 1))
    return -(-total // num_shards) if total else None


def _tensors(folder: Path) -> Iterator[tuple[str, int]]:
    """Type and number of entries of each tensor."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                yield tensor["dtype"], math.prod(tensor["shape"])
