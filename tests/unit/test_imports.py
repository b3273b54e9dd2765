# SPDX-License-Identifier: Apache-2.0
"""One module, one name: the kernels are packaged as ``vllm_specdecpp.kernels``, whatever folder they stand in."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]


def imported(path: Path) -> set[str]:
    """Names of the modules that a file imports absolutely."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
    return found


def test_kernels_are_imported_under_one_name():
    """Imported as ``kernels`` they are other module objects: what a test patches there, the engine does not see."""
    folders = ("vllm_specdecpp", "kernels", "benchmarks", "examples", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    by_wrong_name = {
        str(path.relative_to(ROOT)) for path in files for name in imported(path) if name.split(".")[0] == "kernels"
    }
    assert len(files) > 100 and not by_wrong_name, "import vllm_specdecpp.kernels"
