# SPDX-License-Identifier: Apache-2.0
"""Model Runner V2 on a CPU, in a pytest process of its own: ``make test-v2``.

``tests/conftest.py`` above has set the environment of vLLM; here the runner is chosen, before vLLM is imported.
"""

from __future__ import annotations

import os
from pathlib import Path

from tests.v2 import interpreted_triton

interpreted_triton.install()
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"

KERNEL_TESTS = Path(__file__).parent / "kernels"


def pytest_ignore_collect(collection_path, config):
    """The kernels' tests watch every load and store of their process; they run when they are named."""
    named = [Path(str(argument).split("::")[0]).resolve() for argument in config.args]
    if collection_path == KERNEL_TESTS and not any(KERNEL_TESTS in (path, *path.parents) for path in named):
        return True
    return None
