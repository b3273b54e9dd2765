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
]
PROMPTS = engine_harness.prompts(4, seed=31)


def rounds(config: dict[str, Any], **options: Any) -> list[Any]:
    """For each rule: every request's rounds, on the runner that the environment selects."""
    found = []
    with engine_harness.engine(tiny_models.ensure().target, config, block_size=32, **options) as llm:
        for changes in CHANGES:
            engine_harness.configure(llm, **{"min_speculative_tokens": 1, **changes})
            outputs = engine_harness.generate(llm, PROMPTS, max_tokens=16)
            found.append(engine_harness.rounds_of(outputs, engine_harness.take_rounds(llm)))
    return found


if __name__ == "__main__":
    assert conftest.os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    print(json.dumps(rounds(json.loads(sys.argv[1]))))
