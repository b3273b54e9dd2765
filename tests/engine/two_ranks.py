# SPDX-License-Identifier: Apache-2.0
"""Run by test_tensor_parallel.py in a process of its own: two CPU ranks, the second with noise planted in its draft.

Prints "ready" once the engine stands, then one JSON object: rule -> output tokens and the rounds of each rank.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch

from tests import engine_harness as harness
from tests import tiny_models

NOISE, ALONE = "SPECDECPP_TEST_NOISE", "SPECDECPP_TEST_ALONE"
"""Environment: standard deviation of the noise; 1: no rank listens to another."""

RULES: list[dict[str, Any]] = [{"rule": "confidence"}, {"rule": "entropy"}, {"rule": "fixed"}, {"rule": "cost_aware"}]


def plant() -> None:
    """A ``vllm.general_plugins`` entry point, so that it runs in the workers, which are spawned.

    Adds noise to the draft's logits on rank 1: other features, other scores, other draws than on rank 0.
    """
    from vllm_specdecpp.engine.v1 import SpecDecPPProposer

    if getattr(SpecDecPPProposer, "_planted", False):
        return
    scale, original = float(os.environ[NOISE]), SpecDecPPProposer.compute_logits

    def noisy(self: SpecDecPPProposer, hidden_states: torch.Tensor) -> torch.Tensor:
        from vllm.distributed import get_tp_group

        logits = original(self, hidden_states)
        return logits + scale * torch.randn_like(logits) if get_tp_group().rank_in_group == 1 else logits

    SpecDecPPProposer.compute_logits = noisy  # type: ignore[method-assign]
    if os.environ[ALONE] == "1":
        SpecDecPPProposer.agree = lambda self, decision: decision  # type: ignore[method-assign]
    SpecDecPPProposer._planted = True


def main() -> None:
    tiny = tiny_models.ensure()
    config = {
        "method": "specdecpp", "model": tiny.draft_good, "num_speculative_tokens": 6, "trace_rounds": 10_000
    }  # fmt: skip
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with harness.engine(tiny.target, config, **options) as llm:
        print("ready", flush=True)
        found = {}
        for rule in RULES:
            harness.configure(llm, **rule)
            llm.collective_rpc("specdecpp_rounds", kwargs={"clear": True})
            outputs = harness.generate(llm, harness.prompts(8, seed=3), max_tokens=32, ignore_eos=True)
            rounds = llm.collective_rpc("specdecpp_rounds", kwargs={"clear": True})
            found[rule["rule"]] = {"tokens": harness.token_ids(outputs), "rounds": rounds}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
