# SPDX-License-Identifier: Apache-2.0
"""Prints the rounds of one engine on Model Runner V1 as JSON: ``python -m tests.v2.v1_rounds SPECULATIVE_CONFIG``.

A process of its own: with Triton interpreted, V1 would run other kernels than it does on a CPU.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from tests import conftest, engine_harness, tiny_models

CHANGES: list[dict[str, Any]] = [{"rule": "threshold", "threshold": 0.6}, {"rule": "cost_aware", "threshold": None}]
"""The others are compared with the reference loop on either runner."""
FIRST = 1e-3
CURVES: dict[str, dict[int, float]] = {
    "step": {1: 0.7e-3, 4: 1e-3}, "verify": {1: 10e-3, 4: 10.5e-3, 8: 13e-3, 9: 12e-3, 32: 30e-3}
}  # fmt: skip
"""Seconds: some candidates are worth theirs."""
PROMPTS = engine_harness.prompts(4, seed=31)


def rounds(config: dict[str, Any], **options: Any) -> list[Any]:
    """For each rule: every request's rounds, on the runner that the environment selects."""
    from vllm_specdecpp.costs import timing

    measure = timing.measure
    timing.measure = lambda *args: {"first": {1: FIRST}, "read": {1: FIRST}, **CURVES}
    found = []
    with engine_harness.engine(tiny_models.ensure().target, config, block_size=32, **options) as llm:
        for changes in CHANGES:
            engine_harness.configure(llm, **{"min_speculative_tokens": 1, **changes})
            if changes["rule"] == "cost_aware":
                _fix_costs(llm)
            outputs = engine_harness.generate(llm, PROMPTS, max_tokens=16)
            found.append(engine_harness.rounds_of(outputs, engine_harness.take_rounds(llm)))
    timing.measure = measure
    return found


def _fix_costs(llm: Any) -> None:
    """The same prices on both runners, whatever the clock says and an earlier start has learnt; and reading is free: V1
    reads prompts with the first pass that drafts, V2 with the target."""
    curves = {"first": {1: FIRST}, "read": {1: FIRST}, **CURVES}
    if conftest.os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1":
        from tests.v2 import harness

        cost_aware = harness.fix_costs(llm, curves)
    else:
        engine_harness.set_costs(llm, curves)
        cost_aware = engine_harness.proposer(llm).cost_aware
    engine_harness.forget(cost_aware.rule)


if __name__ == "__main__":
    assert conftest.os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    print(json.dumps(rounds(json.loads(sys.argv[1]))))
