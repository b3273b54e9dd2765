# SPDX-License-Identifier: Apache-2.0
"""``benchmarks.gpu.alone`` runs to its end without a GPU, and says so where rounds are not what they should be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import alone
from vllm_specdecpp.engine.v2.graphs import EAGER, IF_NODES, PER_PASS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(alone, "CELLS", [(3, 1), (3, 2)])
    monkeypatch.setattr(alone, "kernel_tests", lambda: {"passed": True, "summary": "left out"})


def _run(tmp_path: Path, *more: str) -> tuple[int, dict[str, Any]]:
    status = alone.main(["--results", str(tmp_path), *more])
    return status, json.loads((tmp_path / "alone.json").read_text())


def test_replays_of_a_rehearsal(tmp_path):
    status, results = _run(tmp_path)
    rows = results["rows"]
    assert status == 0 and "rehearsal" in results["device"]
    ways = [(mode, stop, batch) for mode in (EAGER, PER_PASS, IF_NODES) for stop in (1, 2) for batch in (1, 2)]
    assert [(r["mode"], r["stop"], r["batch"]) for r in rows] == ways
    assert all(r["right"] and r["seconds"] > 0 and r["calls_outside"] > 0 for r in rows)
    waits = {(r["mode"], r["stop"]): r["host_waits"] for r in rows if r["batch"] == 2}
    assert waits[EAGER, 1] == 1 and waits[EAGER, 2] == 2  # one a pass, until nobody goes on
    assert waits[PER_PASS, 1] == waits[PER_PASS, 2] == 1


def test_replays_that_are_wrong_are_told(tmp_path, monkeypatch):
    """A rule that never stops: rounds are longer than they should be."""
    from benchmarks.gpu import static_draft

    monkeypatch.setattr(alone, "CELLS", [(3, 1)])
    rounds = static_draft.StaticRounds
    made = rounds.__init__
    monkeypatch.setattr(rounds, "__init__", lambda self, draft, most, length, stop: made(self, draft, most, length, 3))
    status, results = _run(tmp_path)
    assert status == 1 and not any(row["right"] for row in results["rows"])


def test_replays_end_when_the_time_is_up(tmp_path):
    _, results = _run(tmp_path, "--seconds", "0")
    assert {row["error"] for row in results["rows"]} == {"the time was up"}


def test_nothing_of_vllm_is_imported():
    code = "import sys; sys.modules['vllm'] = None; import benchmarks.gpu.alone, benchmarks.gpu.static_draft"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
