# SPDX-License-Identifier: Apache-2.0
"""Prompts in, raw rows out: the run's loop, resumable, and its report; with engines that only count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.common import session
from benchmarks.common.records import RawFile, load_prompts, make_units, output_hash, unit_id
from benchmarks.serve import run
from benchmarks.serve.report import main as report_main
from benchmarks.serve.report import write_report
from tests.benchmark_rows import PROVENANCE, SETTINGS, FakeEngines, raw_row, write_prompts

RESULT_KEYS = (
    "pair set temperature batch method tokens_per_second low high mean_candidate_length acceptance command versions git"
)


def test_units_go_round_robin_over_the_sets(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_prompts(tmp_path, name, 5)
    prompts = load_prompts(tmp_path, ["a", "b"], 5)
    assert [unit_id(unit) for unit in make_units(prompts, 1)][:4] == ["a-0", "b-0", "a-1", "b-1"]
    # A fifth prompt alone would be another batch size.
    assert [unit_id(unit) for unit in make_units(prompts, 2)] == ["a-0+a-1", "b-0+b-1", "a-2+a-3", "b-2+b-3"]


def test_missing_prompts_are_reported(tmp_path: Path) -> None:
    write_prompts(tmp_path, "a", 2)
    with pytest.raises(ValueError, match="holds only 2"):
        load_prompts(tmp_path, ["a"], 3)
    with pytest.raises(ValueError, match="has a$"):
        load_prompts(tmp_path, ["z"], 1)


def test_output_hash_sees_order_and_length() -> None:
    assert output_hash([[1, 2], [3]]) == output_hash([(1, 2), (3,)])
    assert len({output_hash(x) for x in ([[1, 2], [3]], [[1], [2, 3]], [[3], [1, 2]])}) == 3


def test_raw_rows_survive_a_kill_in_mid_line(tmp_path: Path) -> None:
    path = tmp_path / "x.raw.jsonl"
    raw = RawFile(path)
    raw.start_run(SETTINGS, PROVENANCE)
    raw.add(raw_row("a-0", "off"))
    before = path.read_bytes()
    path.write_bytes(before + b'{"prompt": "a-0", "meth')
    again = RawFile(path)
    again.start_run(SETTINGS, PROVENANCE)
    again.add(raw_row("a-0", "confidence"))
    assert path.read_bytes().startswith(before)
    assert RawFile(path).done() == {("a-0", "off"), ("a-0", "confidence")}
    assert [r["run"] for r in RawFile(path).runs] == [0, 1]


def test_raw_rows_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "x.raw.jsonl"
    RawFile(path).start_run(SETTINGS, PROVENANCE)
    with pytest.raises(ValueError, match="temperature=0.0, not 1.0"):
        RawFile(path).start_run({**SETTINGS, "temperature": 1.0}, PROVENANCE)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for name in ("a", "b"):
        write_prompts(tmp_path, name, 3)
    FakeEngines.calls, FakeEngines.die_after = [], None
    monkeypatch.setattr(session, "Engines", FakeEngines)
    parts = ["--pair", "T", "D", "--data", str(tmp_path), "--sets", "a", "b", "--prompts", "3", "--max-tokens", "8"]
    return [*parts, "--methods", "off", "draft_model:2", "confidence", "--out", str(tmp_path / "x.jsonl")]


def test_a_run_writes_rows_with_the_agreed_keys(command: list[str], tmp_path: Path) -> None:
    assert run.main(command) == 0
    assert len(FakeEngines.calls) == 2 * 3 * 3
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [list(row) for row in rows] == [RESULT_KEYS.split()] * (3 * 3)
    assert rows[-1]["mean_candidate_length"] == 3.0 and rows[-1]["set"] == "all"
    table = (tmp_path / "x.md").read_text()
    assert "| all | confidence | 6 | 8.00 [8.00, 8.00] | 1.00 [1.00, 1.00] |" in table
    assert "| 6/6 |" in table
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_run_goes_on_where_it_stopped(command: list[str], tmp_path: Path) -> None:
    FakeEngines.die_after = 5
    assert run.main(command) == 130
    first = list(FakeEngines.calls)
    assert len(RawFile(tmp_path / "x.raw.jsonl").rows) == 5
    assert not (tmp_path / "x.jsonl").exists()
    FakeEngines.die_after = None
    assert run.main(command) == 0
    assert FakeEngines.calls[:5] == first
    assert len(RawFile(tmp_path / "x.raw.jsonl").rows) == len(RawFile(tmp_path / "x.raw.jsonl").done()) == 18


def test_a_finished_run_is_not_overwritten(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(command) == 0
    before = (tmp_path / "x.raw.jsonl").read_bytes()
    assert run.main(command) == 2
    assert "pass --force" in capsys.readouterr().err
    assert run.main([*command, "--force"]) == 0
    assert len(FakeEngines.calls) == 18  # nothing is measured twice
    assert (tmp_path / "x.raw.jsonl").read_bytes().startswith(before)


def test_a_time_budget_stops_between_prompts(command: list[str], tmp_path: Path) -> None:
    assert run.main([*command, "--minutes", "0.01"]) == 0  # 0.6 s; a prompt "takes" 3 * 0.5 s
    assert len(RawFile(tmp_path / "x.raw.jsonl").rows) == 3
    assert not (tmp_path / "x.jsonl").exists()
    assert report_main([str(tmp_path / "x.raw.jsonl"), "--out", str(tmp_path / "x.jsonl")]) == 0
    assert len((tmp_path / "x.jsonl").read_text().splitlines()) == 2 * 3


def test_more_prompts_can_be_added_later(command: list[str], tmp_path: Path) -> None:
    fewer = [{"3": "2"}.get(part, part) for part in command]
    assert run.main(fewer) == 0
    assert run.main([*command, "--force"]) == 0
    assert len(FakeEngines.calls) == 18


def test_too_long_a_prompt_is_refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([*command, "--max-model-len", "30"]) == 2
    assert "--max-model-len 30: a-0 needs 38" in capsys.readouterr().err


def test_a_report_needs_rows(tmp_path: Path) -> None:
    raw = RawFile(tmp_path / "x.raw.jsonl")
    with pytest.raises(ValueError, match="holds no run"):
        write_report(raw, tmp_path / "x.jsonl")
