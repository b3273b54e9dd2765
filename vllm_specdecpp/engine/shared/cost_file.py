# SPDX-License-Identifier: Apache-2.0
"""Where costs are kept between starts: a file for each pair of models, machine and versions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vllm_specdecpp.costs.file import CostFile


def cache_folder() -> Path:
    """Where costs are kept: below vLLM's own cache (``VLLM_CACHE_ROOT``)."""
    from vllm import envs

    return Path(envs.VLLM_CACHE_ROOT) / "specdecpp"


def cost_file(vllm_config: Any, device: torch.device, **more: str) -> CostFile:
    """The file for this pair of models, machine and versions; ``more`` is what the times depend on besides."""
    from importlib.metadata import version

    import vllm

    from vllm_specdecpp.provenance import cpu_name, model_label, shrinking

    target, speculative = vllm_config.model_config, vllm_config.speculative_config
    draft = speculative.draft_model_config
    setting = {
        "target": model_label(target.model),
        "draft": model_label(draft.model),
        "dtype": str(target.dtype),
        "quantization": f"{target.quantization}/{draft.quantization}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": str(torch.get_num_threads()) if device.type == "cpu" else "",
        "tensor_parallel_size": str(vllm_config.parallel_config.tensor_parallel_size),
        "enforce_eager": str(target.enforce_eager),
        "vllm": vllm.__version__,
        "torch": version("torch"),
        **more,
    }
    if made := shrinking(draft.model):  # its folder may be made anew under the same name
        setting["shrunk"] = str(made.get("created"))
    return CostFile(cache_folder(), setting)
