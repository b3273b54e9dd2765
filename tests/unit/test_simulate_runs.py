# SPDX-License-Identifier: Apache-2.0
"""The chances of free runs, replayed from recorded answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.simulate import runs


def record(folder: Path, *answers: tuple[list[int], list[int]]) -> Path:
    (folder / "responses").mkdir()
    rows = [
        {"id": str(i), "set": "a", "prompt_token_ids": prompt, "token_ids": output}
        for i, (prompt, output) in enumerate(answers)
    ]
    (folder / "responses/00000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_round_tells_of_the_accepted_candidates_and_the_first_rejected_one(tmp_path: Path) -> None:
    """A verification costs the same at any width, so the whole run is taken: 2, 3, 1; the answer goes on 2, 3, 9."""
    told = list(runs.play(record(tmp_path, ([1, 2, 3, 1, 2, 3], [1, 2, 3, 9])), "cheap", 0))
    assert [(number, name, label) for number, name, _, label in told] == [(0, "a", 1.0), (0, "a", 1.0), (0, "a", 0.0)]
    chances = [chance for _, _, chance, _ in told]
    assert 0.5 < chances[0] < chances[1] < chances[2] < 1.0  # four, five and six tokens match before them


def test_early_rounds_are_not_counted_and_all_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = record(tmp_path, *[([5, 6, 7, 8] * 4, [5, 6, 7, 8] * 20)] * 3)
    command = ["--record", str(folder), "--costs", "cheap", "--after", "3", "--out", str(tmp_path / "x.jsonl")]
    assert runs.main(command) == 0
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [row["set"] for row in rows] == ["all", "a"]
    assert rows[0]["num"] == 3 * 76 - 3 * 20  # rounds of 20, 20, 20 and 16
    assert rows[0]["ece"] < 0.05 and (tmp_path / "x.png").exists()
    assert "| all | 168 | " in (tmp_path / "x.md").read_text()
    assert runs.main(command) == 2 and "there already" in capsys.readouterr().err
    assert runs.main([*command[:-1], str(tmp_path / "y.jsonl"), "--after", "99"]) == 2
    assert "give more answers" in capsys.readouterr().err
