# SPDX-License-Identifier: Apache-2.0
"""Every kernel compiles for an H100, without one: this finds type errors that the interpreter does not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_specdecpp.kernels import report

ROOT = Path(__file__).resolve().parents[3]


def run(*arguments: str, cache: Path, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    """The report in a process that does not interpret kernels."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(cache)} | ({"TRITON_INTERPRET": "1"} if interpret else {})
    command = [sys.executable, "-m", "vllm_specdecpp.kernels.report", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def usages(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, int | str]]:
    folder = tmp_path_factory.mktemp("report")
    done = run("--capability", "90", "--json", str(folder / "usages.json"), cache=folder / "cache")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    print(done.stdout)
    return json.loads((folder / "usages.json").read_text())


def test_every_kernel_is_compiled_and_none_spills(usages) -> None:
    names = {variant.name for variant in report.variants()}
    assert {usage["name"] for usage in usages} == names and len(names) == len(usages)
    for usage in usages:
        assert usage["spill_bytes"] == 0, usage
        assert 0 < usage["registers"] <= 255 and usage["cubin_bytes"] > 1000, usage
        # Two programs fit beside each other on a multiprocessor of an H100: 227 KiB.
        assert usage["shared_bytes"] <= 113 * 1024, usage


def test_the_report_covers_every_kernel_of_the_package() -> None:
    reported = {variant.kernel.__name__ for variant in report.variants()}
    sources = [path.read_text() for path in (ROOT / "kernels").glob("*.py")]
    launched = {name for source in sources for name in re.findall(r"^def (_\w+_kernel)\(", source, re.MULTILINE)}
    assert reported == launched and len(launched) == 10


def test_interpreted_kernels_are_not_reported(tmp_path: Path) -> None:
    done = run(cache=tmp_path, interpret=True)
    assert done.returncode == 2 and "unset TRITON_INTERPRET" in done.stderr and "Traceback" not in done.stderr
