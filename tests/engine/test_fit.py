# SPDX-License-Identifier: Apache-2.0
"""The command ``fit`` with engines of its own and tiny models: killed once, it goes on, and ends with a verdict."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

WORDS = ["sort", "list", "tree", "graph", "file", "sum", "word", "text", "loop", "stack", "queue", "heap", "node"]


def command(tiny: Any, tmp_path: Path) -> list[str]:
    texts = [" ".join(WORDS[(7 * i + 3 * j + i * j) % len(WORDS)] for j in range(3 + i % 5)) for i in range(48)]
    lines = [json.dumps({"id": f"p{i}", "set": f"s{i % 2}", "prompt": f"{t} {i}"}) for i, t in enumerate(texts)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    return [
        *(sys.executable, "-m", "vllm_specdecpp.cli", "fit", "--target", tiny.target, "--draft", tiny.draft_good),
        *("--prompts", str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "out"), "--max-tokens", "24"),
        *("--candidates", "6", "--unit", "8", "--eager", "--dtype", "float32", "--max-model-len", "192"),
    ]


@pytest.mark.slow  # four engines, one after the other
@pytest.mark.timeout(900)
def test_killed_after_the_first_stage(tiny: Any, tmp_path: Path) -> None:
    arguments, out = command(tiny, tmp_path), tmp_path / "out"
    with (tmp_path / "first").open("w") as log:
        first = subprocess.Popen(arguments, stdout=log, stderr=log)
        try:
            while not (out / "data" / "eval" / "manifest.json").exists():
                assert first.poll() is None, (tmp_path / "first").read_text()
                time.sleep(0.1)
        finally:
            first.kill()  # its engine runs in the same process
            first.wait()
    shards = {path: path.stat().st_mtime_ns for path in (out / "data" / "train").rglob("*.safetensors")}
    assert len(shards) == 5 and not (out / "head").exists()

    second = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr
    assert "fit 1/6: collect train, to " in second.stderr and "/train, which is there\n" in second.stderr
    assert {path: path.stat().st_mtime_ns for path in shards} == shards
    sentence, which, line = second.stdout.splitlines()
    assert sentence.startswith("Too few held-out prompts ") and "14 held-out prompts)" in sentence
    assert which == "Serve it without the head:" and line.startswith(f"vllm serve {tiny.target} --speculative-config ")
    config = json.loads((out / "head" / "config.json").read_text())
    assert {"calibration", "rule"} <= config.keys()

    kept = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    third = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert third.returncode == 0 and third.stdout == second.stdout
    assert third.stderr.count(", which is there") == 6
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == kept

    other = subprocess.run([*arguments, "--temperature", "1"], capture_output=True, text=True, check=False)
    assert other.returncode == 2
    assert other.stderr.splitlines()[-1].endswith("--temperature 0.0, not 1.0; give that, or name another --out")
