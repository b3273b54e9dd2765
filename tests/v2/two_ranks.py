# SPDX-License-Identifier: Apache-2.0
"""Run by test_tensor_parallel.py in a process of its own: two CPU ranks on Model Runner V2, the second with noise
planted in its draft."""

from __future__ import annotations

import os
from typing import Any

import torch

from tests import engine_harness as harness
from tests import ranks
from tests.v2 import interpreted_triton

interpreted_triton.install()

THRESHOLD, MAX_LENGTH = 0.8, 5
RULES: list[dict[str, Any]] = [{"rule": "cost_aware"}, {"rule": "confidence", "threshold": THRESHOLD}]
VARIED = ("cost_aware", "confidence")
"""Rules whose lengths must differ, and whose drafts are mostly accepted."""
PROMPTS = harness.prompts(4, seed=31)
MAX_TOKENS = 16
CURVES = {"first": {1: 1e-3}, "step": {1: 1e-3}, "verify": {1: 20e-3, 64: 40e-3}}
"""Seconds that the cost-aware rule goes by: candidates are worth it while they are likely."""


def plant() -> None:
    """On rank 1 the draft's logits are others than on rank 0."""
    import vllm.v1.worker.cpu.shm  # noqa: F401  torch.cuda's streams and events as no-ops, as the CPU worker has them

    from vllm_specdecpp.costs import timing
    from vllm_specdecpp.costs.curves import Curve
    from vllm_specdecpp.costs.model import CostModel
    from vllm_specdecpp.engine.v2.passes import StandaloneARSpeculator
    from vllm_specdecpp.engine.v2.speculator import SpecDecPPSpeculator

    scale, original = float(os.environ[ranks.NOISE]), StandaloneARSpeculator.compute_draft_logits
    measure = timing.measure

    def noisy(self: Any, *args: Any) -> torch.Tensor:
        from vllm.distributed import get_tp_group

        logits = original(self, *args)
        return logits + scale * torch.randn_like(logits) if get_tp_group().rank_in_group == 1 else logits

    def measure_in_vain(*args: Any) -> Any:
        """The ranks meet in every pass that is timed."""
        points = measure(*args)
        assert min(min(curve.values()) for curve in points.values()) > 0
        return CURVES

    StandaloneARSpeculator.compute_draft_logits = noisy
    timing.measure = measure_in_vain  # type: ignore[assignment]
    timing.MOST = 0.3
    CostModel.observe_draft = lambda *args: None  # type: ignore[method-assign]
    Curve.observe = lambda *args: False  # type: ignore[method-assign]
    if os.environ[ranks.ALONE] == "1":
        SpecDecPPSpeculator.agree = lambda self, tensor: tensor  # type: ignore[method-assign]


if __name__ == "__main__":
    ranks.play(plant, RULES, PROMPTS, MAX_TOKENS, max_length=MAX_LENGTH)
