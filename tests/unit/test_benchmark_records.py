# SPDX-License-Identifier: Apache-2.0
"""Prompts in, raw rows out."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.common.records import RawFile, load_prompts, make_groups, output_hash, unit_id
from tests.benchmark_rows import PROVENANCE, SETTINGS, raw_row, write_prompts


def test_a_last_group_that_would_be_smaller_is_left_out(tmp_path: Path) -> None:
    write_prompts(tmp_path, "a", 5)
    rows = load_prompts(tmp_path, ["a"], 5)["a"]
    assert [unit_id(group) for group in make_groups(rows, 2)] == ["a-0+a-1", "a-2+a-3"]


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
