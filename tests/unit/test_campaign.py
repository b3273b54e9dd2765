# SPDX-License-Identifier: Apache-2.0
"""The campaign: its file, the order of measuring, the ratios, the report, and going on after an interruption."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from benchmarks.campaign import __main__ as campaign
from benchmarks.campaign.config import Campaign, load
from benchmarks.campaign.report import cells_of, main, summary, write_report
from benchmarks.common import session
from benchmarks.common.records import RawFile
from tests.benchmark_rows import PROVENANCE, SETTINGS, FakeEngines, raw_row, write_prompts

METHODS = ["off", "draft_model:K=2", "draft_model:K=4", "confidence"]
PART = {"temperature": 0, "batches": [1, 4], "methods": ["off", "draft_model:2", "draft_model:4", "confidence"]}
FILE: dict[str, Any] = {
    "target": "T", "draft": "D", "sets": {"both": ["a", "b"]}, "judged": "confidence", "turns": 2, "max_tokens": 8,
    "parts": [PART, {**PART, "temperature": 1}],
}  # fmt: skip


def rows_at(temperature: float, batch: int, **seconds: float) -> list[dict[str, Any]]:
    """Two groups of a set; ``seconds`` of 100 tokens by the method's name without what follows the colon."""
    return [
        raw_row(f"a-{i}", method, seconds=seconds[method.partition(":")[0]], temperature=temperature, batch=batch)
        for i in range(2)
        for method in METHODS_AT
    ]


METHODS_AT = ["off", "draft_model:K=2", "confidence"]


class TestFile:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"speed": 1}, "speed: Extra inputs"),
            ({"turns": 0}, "turns: Input should be greater"),
            ({"judged": "entropy"}, "judged 'entropy' must be among the methods of every part"),
            ({"parts": [PART, PART]}, "temperature 0, batch 1 stands in two places"),
            ({"parts": [{**PART, "methods": ["confidence"]}]}, "needs the method off"),
            ({"parts": [{**PART, "methods": ["off", "confidence:K=2"]}]}, "parts.0.methods: .*unknown option 'K'"),
            ({"parts": [{**PART, "batches": [0]}]}, "parts.0.batches.0: Input should be greater"),
        ],
    )
    def test_what_is_wrong_is_one_line(self, change: dict[str, Any], message: str, tmp_path: Path) -> None:
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(FILE | change))
        with pytest.raises(ValueError, match=message) as error:
            load(tmp_path / "c.yaml")
        assert "\n" not in str(error.value)

    def test_a_head_is_looked_for_among_the_models(self, tmp_path: Path) -> None:
        (tmp_path / "mine").mkdir()
        args = argparse.Namespace(models=tmp_path, data=tmp_path)
        for head, place in ((None, None), ("mine", str(tmp_path / "mine")), ("org/theirs", "org/theirs")):
            assert campaign.settings_of(Campaign.model_validate(FILE | {"head": head}), args).head == place

    def test_no_file_and_no_yaml(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="No such file"):
            load(tmp_path / "c.yaml")
        (tmp_path / "c.yaml").write_text("a: [")
        with pytest.raises(ValueError, match="is no YAML"):
            load(tmp_path / "c.yaml")

    def test_the_bundled_files_are_good(self) -> None:
        files = sorted(Path(campaign.__file__).parent.glob("*.yaml"))
        assert files
        for file in files:
            loaded = load(file)
            assert loaded.prompts_needed() <= 24 and loaded.methods[0].label == "off"
            for method in loaded.methods:
                assert not method.draft or method.draft in loaded.other_drafts


class TestCells:
    def test_every_turn_visits_all_cells_with_new_groups(self) -> None:
        prompts = {name: [{"id": f"{name}{i}", "set": name, "prompt": "?"} for i in range(4)] for name in "ab"}
        units = campaign.make_cells(Campaign.model_validate(FILE), prompts)
        found = [(u.temperature, u.cell["batch"], u.prompts[0]["set"], u.id) for u in units]
        assert found[:4] == [
            (0.0, 1, "a", "a0"), (0.0, 1, "b", "b0"), (0.0, 4, "a", "a0+a1+a2+a3"), (0.0, 4, "b", "b0+b1+b2+b3"),
        ]  # fmt: skip
        assert {t for t, *_ in found[4:8]} == {1.0}
        # The one group of four is used up by the first turn.
        assert [(t, b, name) for t, b, _, name in found[8:]] == [
            (t, 1, f"{name}1") for t in (0.0, 1.0) for name in "ab"
        ]
        assert all(unit.cell == {"temperature": t, "batch": b} for unit, (t, b, _, _) in zip(units, found, strict=True))

    def test_a_part_has_its_own_methods(self) -> None:
        few = {**PART, "temperature": 1, "methods": ["off", "confidence"]}
        prompts = {"a": [{"id": "a0", "set": "a", "prompt": "?"}]}
        file = Campaign.model_validate(FILE | {"parts": [PART, few], "turns": 1})
        plan = session.make_plan(campaign.make_cells(file, prompts), RawFile(Path("none")))
        assert [(unit.temperature, {m.label for m in order}) for unit, order in plan] == [
            (0.0, set(METHODS)), (1.0, {"off", "confidence"}),
        ]  # fmt: skip


class TestRatios:
    def test_over_the_best_of_vllms_own(self) -> None:
        """At batch 1 the fixed K is the best, at batch 4 speculation off is."""
        rows = rows_at(0.0, 1, off=20.0, draft_model=10.0, confidence=8.0)
        rows += rows_at(0.0, 4, off=5.0, draft_model=10.0, confidence=10.0)
        cells = cells_of(rows, {"0/1": METHODS_AT, "0/4": METHODS_AT}, {"family": ["a"]})
        ours = {place: of["confidence"] for place, of in cells.items()}
        assert list(ours) == [(0.0, name, batch) for name in ("a", "family", "all") for batch in (1, 4)]
        for batch, off, rival, name in ((1, 2.5, 1.25, "draft_model:K=2"), (4, 0.5, 0.5, "off")):
            for of in ("a", "family"):
                cell = ours[0.0, of, batch]
                assert cell.over_off is not None and cell.over_off.value == pytest.approx(off)
                assert cell.over_rival is not None and cell.over_rival.value == pytest.approx(rival)
                assert (cell.set, cell.rival) == (of, name)
        assert summary(cells, "confidence", ("family", "all")) == {
            "method": "confidence", "cells": 2,
            "over_off_geometric_mean": pytest.approx(1.25**0.5, abs=1e-4), "over_off_lowest": 0.5,
            "over_off_surely_below_0.98": 1,
            "over_rival_geometric_mean": pytest.approx(0.625**0.5, abs=1e-4), "over_rival_lowest": 0.5,
            "over_rival_surely_below_0.98": 1,
        }  # fmt: skip

    def test_temperatures_are_not_mixed(self) -> None:
        """The same prompts at another temperature are another cell."""
        rows = rows_at(0.0, 1, off=20.0, draft_model=10.0, confidence=10.0)
        rows += rows_at(1.0, 1, off=20.0, draft_model=10.0, confidence=40.0)
        cells = cells_of(rows, {"0/1": METHODS_AT, "1/1": METHODS_AT}, {})
        rates = {t: cells[t, "a", 1]["confidence"].tokens_per_second.value for t in (0.0, 1.0)}
        assert rates == {0.0: pytest.approx(10.0), 1.0: pytest.approx(2.5)}

    def test_an_unfinished_cell_is_left_out(self) -> None:
        rows = rows_at(0.0, 1, off=20.0, draft_model=10.0, confidence=10.0)
        rows += rows_at(0.0, 2, off=20.0, draft_model=10.0, confidence=10.0)[:2]
        methods = {"0/1": METHODS_AT, "0/2": METHODS_AT}
        assert {batch for _, _, batch in cells_of(rows, methods, {})} == {1}
        with pytest.raises(ValueError, match="no group was finished"):
            cells_of(rows[-2:], methods, {})


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for name in ("a", "b"):
        write_prompts(tmp_path, name, 8)
    FakeEngines.calls, FakeEngines.die_after = [], None
    monkeypatch.setattr(session, "Engines", FakeEngines)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(FILE))
    return [str(tmp_path / "c.yaml"), "--data", str(tmp_path), "--out", str(tmp_path / "x.jsonl")]


RESULT_KEYS = (
    "pair set temperature batch method tokens_per_second low high mean_candidate_length acceptance command versions git"
)
NUM_MEASUREMENTS = 2 * 2 * 2 * 2 * 4
"""Turns, temperatures, batches, sets, methods."""


class TestCommand:
    def test_it_writes_table_rows_and_heat_maps(
        self, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert campaign.main(command) == 0
        assert len(FakeEngines.calls) == NUM_MEASUREMENTS
        rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
        assert [list(row) for row in rows] == [RESULT_KEYS.split()] * (2 * 2 * 4 * 4)  # T, batches, sets, methods
        assert (rows[-1]["method"], rows[-1]["mean_candidate_length"]) == ("confidence", 3.0)
        assert {(row["temperature"], row["batch"]) for row in rows} == {(t, b) for t in (0.0, 1.0) for b in (1, 4)}
        # A group of four prompts gives four times the tokens in the same half second.
        rates = {row["batch"]: row["tokens_per_second"] for row in rows}
        assert rates == {1: 8.0, 4: 32.0}
        table = (tmp_path / "x.md").read_text()
        assert "| T | set | batch | groups | off | best fixed K | confidence | over off | over vLLM's best |" in table
        assert "| 1 | 4 | both | 32.00 | 32.00 (off) | **32.00** | 1.00 [1.00, 1.00] | 1.00 [1.00, 1.00] |" in table
        assert "| 1 | b | 4 | 2 | 32.00 | 32.00 (K=2) | 32.00 | 1.00 [1.00, 1.00] | 1.00 [1.00, 1.00] (off) |" in table
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
        last = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert last["cells"] == 8 and last["over_rival_lowest"] == 1.0
        again = [str(tmp_path / "x.raw.jsonl"), "--out", str(tmp_path / "y.jsonl"), "--judged"]
        assert main([*again, "entropy"]) == 2 and "entropy: not measured" in capsys.readouterr().err
        assert main([*again, "draft_model:K=4"]) == 0
        assert "ratios of draft_model:K=4," in (tmp_path / "y.md").read_text()

    def test_all_methods_answer_a_group_before_the_next(self, command: list[str], tmp_path: Path) -> None:
        campaign.main(command)
        rows = RawFile(tmp_path / "x.raw.jsonl").rows
        groups = [rows[i : i + 4] for i in range(0, len(rows), 4)]
        assert all(len({(r["prompt"], r["temperature"]) for r in group}) == 1 for group in groups)
        assert {group[0]["method"] for group in groups} == set(METHODS)  # each comes first somewhere
        # Greedy outputs are compared with off's as soon as it has run; sampled ones are not.
        assert {r["equals_off"] for r in rows if r["temperature"] == 1.0} == {None}
        assert {r["equals_off"] for r in rows if r["temperature"] == 0.0} == {None, True}

    def test_an_interrupted_run_goes_on_where_it_stopped(self, command: list[str], tmp_path: Path) -> None:
        """After the first turn of temperature 0: the same prompts at temperature 1 are not done yet."""
        FakeEngines.die_after = NUM_MEASUREMENTS // 4 + 2
        assert campaign.main(command) == 130
        FakeEngines.die_after = None
        assert main([str(tmp_path / "x.raw.jsonl"), "--out", str(tmp_path / "part.jsonl")]) == 0
        assert {json.loads(x)["temperature"] for x in (tmp_path / "part.jsonl").read_text().splitlines()} == {0.0}
        assert campaign.main(command) == 0
        assert len(FakeEngines.calls) == NUM_MEASUREMENTS
        done = RawFile(tmp_path / "x.raw.jsonl").done("temperature", "batch")
        assert len(done) == NUM_MEASUREMENTS

    def test_quick_is_the_first_part_once(self, command: list[str]) -> None:
        assert campaign.main([*command, "--quick"]) == 0
        assert len(FakeEngines.calls) == 2 * 4  # sets, methods

    def test_a_finished_report_is_not_overwritten(
        self, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        campaign.main(command)
        (tmp_path / "x.jsonl").write_text("mine")
        assert campaign.main(command) == 2
        assert "pass --force" in capsys.readouterr().err
        assert (tmp_path / "x.jsonl").read_text() == "mine"
        assert campaign.main([*command, "--force"]) == 0
        assert len(FakeEngines.calls) == NUM_MEASUREMENTS  # nothing is measured twice

    def test_a_time_budget_stops_between_groups(
        self, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = time.monotonic()  # no time passes but what a group is expected to take: 4 * 0.5 s
        monkeypatch.setattr(session, "time", SimpleNamespace(monotonic=lambda: now))
        assert campaign.main([*command, "--minutes", "0.01"]) == 0
        assert len(RawFile(tmp_path / "x.raw.jsonl").rows) == 4
        assert not (tmp_path / "x.jsonl").exists()

    def test_one_part_can_grow_and_shows_every_method(self, command: list[str], tmp_path: Path) -> None:
        one = FILE | {"parts": [{**PART, "batches": [1]}]}
        for turns in (1, 2):
            (tmp_path / "c.yaml").write_text(yaml.safe_dump(one | {"turns": turns}))
            assert campaign.main([*command, "--force"]) == 0
            assert len(FakeEngines.calls) == turns * 2 * 4
        table = (tmp_path / "x.md").read_text()
        same = "8.00 [8.00, 8.00] | 1.00 [1.00, 1.00] | 1.00 [1.00, 1.00] (K=2)"
        assert f"| all | confidence | 4 | {same} | 3.00 | 66.7 % | 4/4 |" in table
        assert f"| a | off | 2 | {same} |  |  |  |" in table

    def test_too_long_a_prompt_is_refused(
        self, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(FILE | {"max_model_len": 30}))
        assert campaign.main(command) == 2
        assert "max_model_len 30: a-0 needs 38" in capsys.readouterr().err

    def test_a_report_needs_a_campaigns_rows(self, tmp_path: Path) -> None:
        raw = RawFile(tmp_path / "x.raw.jsonl")
        with pytest.raises(ValueError, match="holds no run: measure first"):
            write_report(raw, tmp_path / "x.jsonl")
        raw.start_run(SETTINGS, PROVENANCE)
        with pytest.raises(ValueError, match="is no campaign's"):
            write_report(raw, tmp_path / "x.jsonl")
