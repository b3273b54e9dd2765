# SPDX-License-Identifier: Apache-2.0
"""The file of costs: what comes back, what is refused, and what a start makes of a damaged one."""

from __future__ import annotations

import json
import logging
import os
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from vllm_specdecpp.costs import file
from vllm_specdecpp.costs.file import CostFile

CURVES = {
    "first": {1: 0.07, 2: 0.08}, "step": {1: 0.06, 2: 0.065}, "verify": {1: 0.17, 16: 0.4, 256: 4.0},
    "read": {2: 0.05, 256: 0.9},
}  # fmt: skip
SETTING = {"target": "org/large", "draft": "org/small", "device": "a machine"}


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    costs = CostFile(tmp_path / "deep" / "costs", SETTING)
    assert costs.load() is None
    assert costs.save(CURVES, {"theta": [1.0, -0.5], "by": {"k": 3}})
    for kept in (costs.load(), file.read(costs.path)):
        assert kept is not None and (kept.curves, kept.setting) == (CURVES, SETTING)
        assert kept.learnt == {"theta": [1.0, -0.5], "by": {"k": 3}} and 0 <= kept.age_seconds < 60
    assert [path.name for path in costs.path.parent.iterdir()] == [costs.path.name]  # no .part is left
    costs.rows = {"draft": [4, 4, 4, 4, 8, 8, 8, 8]}
    assert costs.save(CURVES)
    assert file.read(costs.path).learnt == {} and file.read(costs.path).rows == costs.rows


def test_another_setting_is_another_file(tmp_path: Path) -> None:
    costs = CostFile(tmp_path, SETTING)
    costs.save(CURVES)
    other = CostFile(tmp_path, {**SETTING, "tp": "2"})
    assert other.load() is None
    costs.path.rename(other.path)
    assert other.load() is None and file.read(other.path).curves == CURVES


def test_age(tmp_path: Path) -> None:
    costs = CostFile(tmp_path, SETTING)
    costs.save(CURVES)
    for hours, age in ((2, 7200), (-2, 0)):  # the clock may have been set back since
        written = datetime.now(timezone.utc) - timedelta(hours=hours)
        costs.path.write_text(json.dumps(json.loads(costs.path.read_text()) | {"written": written.isoformat()}))
        assert file.read(costs.path).age_seconds == pytest.approx(age, abs=60)


OLD = {"format": 1, "key": SETTING, **{name: CURVES[name] for name in ("first", "step", "verify")}}
"""What earlier versions left: it lacks the price of reading."""


@pytest.mark.parametrize(
    "change",
    [
        "", "{", "[]", "3", json.dumps(OLD),
        {"format": 2}, {"setting": 3}, {"learnt": 3}, {"learnt": None}, {"written": "yesterday"}, {"surprise": 1},
        {"written": "2026-01-02T03:04:05"}, {"curves": {**CURVES, "read": {}}}, {"curves": {**CURVES, "read": {1: -1}}},
        {"curves": {name: CURVES[name] for name in ("first", "step", "verify")}},
        {"curves": {**CURVES, "more": {1: 1}}},
        {"rows": {"draft": [1, 2]}}, {"rows": {"draft": [4, 4, 4, 3, 8, 8, 8, 8]}}, {"rows": {"draft": [9] * 8}},
        {"rows": {"draft": [4.0, 4, 4, 4, 8, 8, 8, 8]}}, {"rows": {"x": [8] * 8}}, {"rows": {"draft": None}},
        {"rows": {"draft": ["a"] * 8}}, {"rows": 3},
        {"curves": {**CURVES, "read": [1]}}, {"curves": {**CURVES, "read": {"a": 1}}},
    ],
)  # fmt: skip
def test_damaged(tmp_path: Path, change: Any, caplog: pytest.LogCaptureFixture) -> None:
    costs = CostFile(tmp_path, SETTING)
    costs.save(CURVES)
    text = change if isinstance(change, str) else json.dumps(json.loads(costs.path.read_text()) | change)
    costs.path.write_text(text)
    with pytest.raises(ValueError, match="^specdecpp: .*costs-.* is damaged") as error:
        file.read(costs.path)
    assert "\n" not in str(error.value)
    with caplog.at_level(logging.WARNING):
        assert costs.load() is None  # measure anew
    assert "is damaged" in caplog.text
    assert costs.save(CURVES) and costs.load() is not None


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^specdecpp: .*none.json cannot be read"):
        file.read(tmp_path / "none.json")


def test_what_can_neither_be_read_nor_written_is_logged_and_left_alone(tmp_path, caplog, monkeypatch) -> None:
    costs = CostFile(tmp_path, SETTING)
    costs.path.mkdir()  # nobody, root included, can read or replace it
    (costs.path / "mine").write_text("")
    with caplog.at_level(logging.WARNING):
        assert costs.load() is None and not costs.save(CURVES)
    assert "cannot be read" in caplog.text and "cannot be written" in caplog.text
    assert [path.name for path in tmp_path.rglob("*")] == [costs.path.name, "mine"]

    def forbidden(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "stat", forbidden)  # as in a folder of somebody else's
    assert costs.load() is None


def test_a_disk_that_cannot_be_written_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        assert not CostFile(tmp_path / "file", {}).save(CURVES)
    assert "cannot be written" in caplog.text
