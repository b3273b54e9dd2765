# SPDX-License-Identifier: Apache-2.0
"""Two CPU ranks on Model Runner V2 that see different numbers decide alike; without rank 0's word they come apart."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import engine_harness as harness
from tests.reference_loop import Rule, generate
from tests.v2.two_ranks import ALONE, MAX_TOKENS, NOISE, PROMPTS

ROOT = Path(__file__).parents[2]
START_SECONDS, RUN_SECONDS = 300, 60
"""How long the ranks may take to start; how long ranks that wait for each other are watched."""


def _two_ranks(folder: Path, alone: bool, seconds: float) -> list[str]:
    """The lines that the two ranks printed within ``seconds`` after they stood ready; whatever they do, they end."""
    plugin = folder / "planted-1.dist-info"
    plugin.mkdir()
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1\n")
    (plugin / "entry_points.txt").write_text("[vllm.general_plugins]\nplanted = tests.v2.two_ranks:plant\n")
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, NOISE: "1.0", ALONE: str(int(alone))}
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.v2.two_ranks"],
            cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, env=environment,
        )  # fmt: skip
    try:
        ready: float | None = None
        begun = time.monotonic()
        while process.poll() is None and time.monotonic() - (ready or begun) < (seconds if ready else START_SECONDS):
            if ready is None and "ready" in log.read_text().splitlines():
                ready = time.monotonic()
            time.sleep(0.2)
        lines = log.read_text().splitlines()
        assert alone or "ready" in lines, "\n".join(lines[-40:])
        return lines[lines.index("ready") + 1 :] if "ready" in lines else []
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _found(lines: list[str]) -> dict[str, Any] | None:
    return next((json.loads(line) for line in lines if line.startswith("{")), None)


def test_ranks_with_different_numbers_decide_alike(tmp_path, reference):
    found = _found(_two_ranks(tmp_path, alone=False, seconds=START_SECONDS))
    assert found is not None, (tmp_path / "log").read_text()[-3000:]
    target, draft = reference("target"), reference("draft_good")
    lengths: dict[str, Any] = {"max_tokens": MAX_TOKENS, "max_model_len": harness.MAX_MODEL_LEN}
    expected = [generate(target, draft, p, Rule("fixed", max_length=1), **lengths)[1] for p in PROMPTS]
    for rule, result in found.items():
        assert result["tokens"] == expected, rule
        first, second = result["rounds"]
        assert first == second and len(first) >= 15, rule
        assert len({len(r["candidates"]) for r in first}) >= 4, rule
        # Rank 0's draft, not the noisy one.
        assert sum(r["accepted"] for r in first) > 0.5 * sum(len(r["candidates"]) for r in first), rule


@pytest.mark.slow
def test_ranks_that_do_not_agree_come_apart(tmp_path):
    """The test's power: with the same noise, and each rank left to itself, they hang or differ."""
    found = _found(_two_ranks(tmp_path, alone=True, seconds=RUN_SECONDS))
    assert found is None or any(r["rounds"][0] != r["rounds"][1] for r in found.values())
