# SPDX-License-Identifier: Apache-2.0
"""The matrix of cells: what is measured in which order, the ratios, the report, and going on after an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import session
from benchmarks.common.records import RawFile
from benchmarks.serve import matrix
from benchmarks.serve.matrix import judged_method, make_cells, make_parser, methods_of
from benchmarks.serve.matrix_report import cells_of, main, over_better, summary
from benchmarks.serve.report import main as report_main
from tests.benchmark_rows import METHODS, FakeEngines, raw_row, write_prompts


def rows_at(temperature: float, batch: int, **seconds: float) -> list[dict[str, Any]]:
    """Two groups of a set; ``seconds`` of 100 tokens by the method's name without what follows the colon."""
    return [
        raw_row(f"a-{i}", method, seconds=seconds[method.partition(":")[0]], temperature=temperature, batch=batch)
        for i in range(2)
        for method in ("off", "draft_model:K=2", "confidence")
    ]


METHODS_AT = ["off", "draft_model:K=2", "confidence"]


class TestCells:
    def test_every_turn_visits_all_cells_with_new_groups(self) -> None:
        prompts = {name: [{"id": f"{name}{i}", "set": name, "prompt": "?"} for i in range(4)] for name in "ab"}
        units = make_cells(prompts, [0.0, 1.0], [1, 4], turns=2, visit=2)
        found = [(u.temperature, u.cell["batch"], u.prompts[0]["set"], u.id) for u in units]
        assert found[:6] == [
            (0.0, 1, "a", "a0"), (0.0, 1, "a", "a1"), (0.0, 1, "b", "b0"), (0.0, 1, "b", "b1"),
            (0.0, 4, "a", "a0+a1+a2+a3"), (0.0, 4, "b", "b0+b1+b2+b3"),
        ]  # fmt: skip
        assert {t for t, *_ in found[6:12]} == {1.0}
        # The one group of four is used up by the first turn.
        assert [(t, b, name) for t, b, _, name in found[12:]] == [
            (t, 1, f"{name}{i}") for t in (0.0, 1.0) for name in "ab" for i in (2, 3)
        ]
        assert len(make_cells(prompts, [0.0], [1], turns=99, visit=3)) == 2 * 4
        assert all(unit.cell == {"temperature": t, "batch": b} for unit, (t, b, _, _) in zip(units, found, strict=True))

    @pytest.mark.parametrize(
        ("temperatures", "batches", "turns", "visit", "message"),
        [
            ([0.0], [1, 8], 4, 1, "--batches 8: there are 4"),
            ([0.0, 0.0], [1], 4, 1, "--temperatures 0 0: name each once"),
            ([0.0], [2, 2], 4, 1, "--batches 2 2"),
            ([-1.0], [1], 4, 1, "must be 0 or more"),
            ([0.0], [0], 4, 1, "1 or more"),
            ([0.0], [1], 0, 1, "1 or more"),
            ([0.0], [1], 1, 0, "1 or more"),
        ],
    )
    def test_bad_numbers(
        self, temperatures: list[float], batches: list[int], turns: int, visit: int, message: str
    ) -> None:
        prompts = {"a": [{"id": str(i), "set": "a", "prompt": "?"} for i in range(4)]}
        with pytest.raises(ValueError, match=message):
            make_cells(prompts, temperatures, batches, turns, visit)

    def test_the_papers_rule_needs_a_head(self) -> None:
        common = ["--pair", "T", "D", "--data", ".", "--out", "x.jsonl", "--fixed-k", "3"]
        labels = [method.label for method in methods_of(make_parser().parse_args(common))]
        assert labels == ["off", "draft_model:K=3", "confidence", "cost_aware"]
        args = make_parser().parse_args([*common, "--head", "H"])
        methods = methods_of(args)
        assert [method.label for method in methods][2:] == ["threshold", "confidence", "cost_aware"]
        assert judged_method(args, methods) == "cost_aware"
        for judged in ("entropy", "off", "draft_model:3"):
            with pytest.raises(ValueError, match="must be one of --rules"):
                judged_method(make_parser().parse_args([*common, "--judged", judged]), methods)


class TestRatios:
    def test_over_the_better_of_fixed_k_and_off(self) -> None:
        """At batch 1 the fixed K is the better base, at batch 4 speculation off is."""
        rows = rows_at(0.0, 1, off=20.0, draft_model=10.0, confidence=8.0)
        rows += rows_at(0.0, 4, off=5.0, draft_model=10.0, confidence=10.0)
        cells = cells_of(rows, METHODS_AT)
        ours = {place: of["confidence"] for place, of in cells.items()}
        assert list(ours) == [(0.0, "a", 1), (0.0, "a", 4), (0.0, "all", 1), (0.0, "all", 4)]
        for batch, off, fixed, better in ((1, 2.5, 1.25, 1.25), (4, 0.5, 1.0, 0.5)):
            cell = ours[0.0, "a", batch]
            assert cell.over_off is not None and cell.over_off.value == pytest.approx(off)
            assert cell.over_best_fixed_k is not None and cell.over_best_fixed_k.value == pytest.approx(fixed)
            ratio = over_better(cell)
            assert ratio is not None and ratio.value == pytest.approx(better)
        assert summary(cells, "confidence") == {
            "method": "confidence", "cells": 2,
            "over_off_geometric_mean": pytest.approx(1.25**0.5, abs=1e-4), "over_off_lowest": 0.5,
            "over_better_geometric_mean": pytest.approx(0.625**0.5, abs=1e-4), "over_better_lowest": 0.5,
            "over_best_fixed_k_batch_1_geometric_mean": 1.25, "over_best_fixed_k_batch_1_lowest": 1.25,
        }  # fmt: skip

    def test_temperatures_are_not_mixed(self) -> None:
        """The same prompts at another temperature are another cell."""
        rows = rows_at(0.0, 1, off=20.0, draft_model=10.0, confidence=10.0)
        rows += rows_at(1.0, 1, off=20.0, draft_model=10.0, confidence=40.0)
        cells = cells_of(rows, METHODS_AT)
        rates = {t: cells[t, "a", 1]["confidence"].tokens_per_second.value for t in (0.0, 1.0)}
        assert rates == {0.0: pytest.approx(10.0), 1.0: pytest.approx(2.5)}

    def test_an_unfinished_cell_is_left_out(self) -> None:
        rows = rows_at(0.0, 1, off=20.0, draft_model=10.0, confidence=10.0)
        rows += rows_at(0.0, 2, off=20.0, draft_model=10.0, confidence=10.0)[:2]
        assert {batch for _, _, batch in cells_of(rows, METHODS_AT)} == {1}
        with pytest.raises(ValueError, match="no group was finished"):
            cells_of(rows[-2:], METHODS)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for name in ("a", "b"):
        write_prompts(tmp_path, name, 4)
    FakeEngines.calls, FakeEngines.die_after = [], None
    monkeypatch.setattr(session, "Engines", FakeEngines)
    parts = ["--pair", "T", "D", "--data", str(tmp_path), "--sets", "a", "b", "--prompts", "4", "--max-tokens", "8"]
    parts += ["--batches", "1", "4", "--turns", "2", "--visit", "1", "--fixed-k", "2", "4", "--rules", "confidence"]
    return [*parts, "--out", str(tmp_path / "x.jsonl")]


NUM_MEASUREMENTS = 2 * 2 * (2 + 1) * 4
"""Temperatures, sets, groups of batch 1 and of batch 4, methods."""


class TestCommand:
    def test_it_writes_table_rows_and_heat_maps(
        self, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert matrix.main(command) == 0
        assert len(FakeEngines.calls) == NUM_MEASUREMENTS
        rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
        assert len(rows) == 2 * 2 * 3 * 4  # temperatures, batches, sets and all, methods
        assert {(row["temperature"], row["batch"]) for row in rows} == {(t, b) for t in (0.0, 1.0) for b in (1, 4)}
        # A group of four prompts gives four times the tokens in the same half second.
        rates = {row["batch"]: row["tokens_per_second"] for row in rows}
        assert rates == {1: 8.0, 4: 32.0}
        table = (tmp_path / "x.md").read_text()
        assert "| T | set | batch | groups | off | best fixed K | confidence | over off | over best fixed K |" in table
        assert "| 1 | b | 4 | 1 | 32.00 | 32.00 (K=2) | 32.00 | 1.00 | 1.00 |" in table
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
        last = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert last["cells"] == 8 and last["over_better_lowest"] == 1.0

    def test_all_methods_answer_a_group_before_the_next(self, command: list[str], tmp_path: Path) -> None:
        matrix.main(command)
        rows = RawFile(tmp_path / "x.raw.jsonl").rows
        groups = [rows[i : i + 4] for i in range(0, len(rows), 4)]
        assert all(len({(r["prompt"], r["temperature"]) for r in group}) == 1 for group in groups)
        assert {group[0]["method"] for group in groups} == set(METHODS)  # each comes first somewhere
        # Greedy outputs are compared with off's as soon as it has run; sampled ones are not.
        assert {r["equals_off"] for r in rows if r["temperature"] == 1.0} == {None}
        assert {r["equals_off"] for r in rows if r["temperature"] == 0.0} == {None, True}

    def test_an_interrupted_run_goes_on_where_it_stopped(self, command: list[str], tmp_path: Path) -> None:
        """After the first turn of temperature 0: the same prompts at temperature 1 are not done yet."""
        FakeEngines.die_after = NUM_MEASUREMENTS // 3 + 2
        assert matrix.main(command) == 130
        FakeEngines.die_after = None
        assert main([str(tmp_path / "x.raw.jsonl"), "--out", str(tmp_path / "part.jsonl")]) == 0
        assert {json.loads(x)["temperature"] for x in (tmp_path / "part.jsonl").read_text().splitlines()} == {0.0}
        assert matrix.main(command) == 0
        assert len(FakeEngines.calls) == NUM_MEASUREMENTS
        done = RawFile(tmp_path / "x.raw.jsonl").done("temperature", "batch")
        assert len(done) == NUM_MEASUREMENTS

    def test_a_finished_report_is_not_overwritten(
        self, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        matrix.main(command)
        (tmp_path / "x.jsonl").write_text("mine")
        assert matrix.main(command) == 2
        assert "pass --force" in capsys.readouterr().err
        assert (tmp_path / "x.jsonl").read_text() == "mine"

    def test_the_other_report_says_which_to_take(
        self, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        matrix.main(command)
        assert report_main([str(tmp_path / "x.raw.jsonl"), "--out", str(tmp_path / "y.jsonl")]) == 2
        assert "use python -m benchmarks.serve.matrix_report" in capsys.readouterr().err
