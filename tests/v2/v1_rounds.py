# SPDX-License-Identifier: Apache-2.0
"""Prints the rounds of one engine on Model Runner V1 as JSON: ``python -m tests.v2.v1_rounds SPECULATIVE_CONFIG``.

A process of its own: with Triton interpreted, V1 would run other kernels than it does on a CPU.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from tests import conftest, engine_harness, tiny_models

CHANGES: list[dict[str, Any]] = [
    {"rule": "threshold", "threshold": 0.6},
    {"rule": "confidence", "threshold": 0.5},
    {"rule": "entropy", "threshold": 0.9},
    {"rule": "fixed", "threshold": None},
    {"rule": "cost_aware", "threshold": None},
]
FIRST = 4e-3
CURVES: dict[str, dict[int, float]] = {
    "step": {1: 2e-3, 4: 3e-3}, "verify": {1: 10e-3, 4: 11e-3, 8: 16e-3, 9: 15e-3, 32: 40e-3}
}  # fmt: skip
"""Seconds: some candidates are worth theirs."""
PROMPTS = engine_harness.prompts(4, seed=31)


def rounds(config: dict[str, Any], **options: Any) -> list[Any]:
    """For each rule: every request's rounds, on the runner that the environment selects."""
    from vllm_specdecpp.engine import costs

    measure = costs.measure
    costs.measure = lambda *args: {"first": {1: FIRST}, **CURVES}
    found = []
    with engine_harness.engine(tiny_models.ensure().target, config, block_size=32, **options) as llm:
        for changes in CHANGES:
            engine_harness.configure(llm, **{"min_speculative_tokens": 1, **changes})
            if changes["rule"] == "cost_aware":
                _fix_costs(llm)
            outputs = engine_harness.generate(llm, PROMPTS, max_tokens=16)
            found.append(engine_harness.rounds_of(outputs, engine_harness.take_rounds(llm)))
    costs.measure = measure
    return found


def _fix_costs(llm: Any) -> None:
    """The same prices on both runners, whatever the clock says: on V2 every round has a first pass."""
    if conftest.os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1":
        from tests.v2 import harness

        harness.fix_costs(llm, {"first": {1: FIRST}, **CURVES})
        return
    verify = {width: seconds + FIRST for width, seconds in CURVES["verify"].items()}
    engine_harness.set_costs(llm, {**CURVES, "first": {1: 1e-12}, "verify": verify})
    cost_aware = engine_harness.proposer(llm).cost_aware
    cost_aware._overheads = None
    cost_aware._leave_out = lambda *args: None  # on V2 there is nothing to catch up with


if __name__ == "__main__":
    assert conftest.os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    print(json.dumps(rounds(json.loads(sys.argv[1]))))
