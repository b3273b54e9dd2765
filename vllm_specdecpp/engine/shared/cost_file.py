# SPDX-License-Identifier: Apache-2.0
"""Where costs are kept between starts, a file for each pair of models, machine and versions; how a start uses it."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vllm_specdecpp.costs.file import CostFile
from vllm_specdecpp.costs.model import CostModel, Points
from vllm_specdecpp.costs.timing import most_tokens
from vllm_specdecpp.decision.cost_aware import CostAwareRule

logger = logging.getLogger("vllm.specdecpp")


def cache_folder() -> Path:
    """Where costs are kept: below vLLM's own cache (``VLLM_CACHE_ROOT``)."""
    from vllm import envs

    return Path(envs.VLLM_CACHE_ROOT) / "specdecpp"


def cost_file(vllm_config: Any, device: torch.device, **more: str) -> CostFile:
    """The file for this pair of models, machine and versions; ``more`` is what the times depend on besides."""
    from importlib.metadata import version

    import vllm

    from vllm_specdecpp.provenance import model_label

    target, speculative = vllm_config.model_config, vllm_config.speculative_config
    draft = speculative.draft_model_config
    setting = {
        "target": model_label(target.model),
        "draft": model_label(draft.model),
        "dtype": str(target.dtype),
        "quantization": f"{target.quantization}/{draft.quantization}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": str(torch.get_num_threads()) if device.type == "cpu" else "",
        "tensor_parallel_size": str(vllm_config.parallel_config.tensor_parallel_size),
        "enforce_eager": str(target.enforce_eager),
        "vllm": vllm.__version__,
        "torch": version("torch"),
        **more,
    }
    return CostFile(cache_folder(), setting)


def start_rule(
    file: CostFile,
    measure: Callable[[], Points],
    agree: Callable[[torch.Tensor], torch.Tensor],
    scheduler_config: Any,
    max_length: int,
    *,
    lag: int,
    adapt: bool,
) -> tuple[CostAwareRule | None, bool]:
    """The cost-aware rule with what the last run left in ``file``, else with costs measured now; on every rank.

    Args:
        file: where the costs are kept.
        measure: times both models; ranks meet in it.
        agree: rank 0's tensor on every rank.
        scheduler_config: vLLM's, for the widest batch.
        max_length: upper bound on the candidate length.
        lag, adapt: as in :class:`CostAwareRule`.

    Returns:
        The rule, None on ranks that follow rank 0; and whether its costs were measured now.
    """
    from vllm.distributed import get_tp_group

    leads = get_tp_group().rank_in_group == 0
    kept = file.load() if leads else None
    measured = not bool(agree(torch.tensor([kept is not None])))
    points = measure() if measured else None
    if not leads:
        return None, measured
    logger.info("specdecpp: what passes cost is kept in %s", file.path)
    curves = points if kept is None else kept.curves
    assert curves is not None
    model = CostModel(**curves, max_reqs=scheduler_config.max_num_seqs, max_tokens=most_tokens(scheduler_config))
    return CostAwareRule(model, max_length, lag=lag, adapt=adapt), measured


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
