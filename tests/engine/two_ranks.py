# SPDX-License-Identifier: Apache-2.0
"""Run by test_tensor_parallel.py in a process of its own: two CPU ranks, the second with noise planted in its draft."""

from __future__ import annotations

import os
from typing import Any

import torch

from tests import engine_harness as harness
from tests import ranks

THRESHOLD, MAX_LENGTH = 0.5, 6
RULES: list[dict[str, Any]] = [{"rule": "confidence", "threshold": THRESHOLD}, {"rule": "cost_aware"}]
VARIED = ("confidence",)
"""Rules whose lengths must differ, and whose drafts are mostly accepted."""
PROMPTS = harness.prompts(4, seed=3)
MAX_TOKENS = 16


def plant() -> None:
    """Noise on the draft's logits on rank 1: other features, other scores, other draws than on rank 0."""
    from vllm_specdecpp.engine.v1.proposer import SpecDecPPProposer

    scale, original = float(os.environ[ranks.NOISE]), SpecDecPPProposer.compute_logits

    def noisy(self: SpecDecPPProposer, hidden_states: torch.Tensor) -> torch.Tensor:
        from vllm.distributed import get_tp_group

        logits = original(self, hidden_states)
        return logits + scale * torch.randn_like(logits) if get_tp_group().rank_in_group == 1 else logits

    SpecDecPPProposer.compute_logits = noisy  # type: ignore[method-assign]
    if os.environ[ranks.ALONE] == "1":
        SpecDecPPProposer.agree = lambda self, tensor: tensor  # type: ignore[method-assign]


if __name__ == "__main__":
    ranks.play(plant, RULES, PROMPTS, MAX_TOKENS, max_length=MAX_LENGTH)
