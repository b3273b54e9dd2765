# SPDX-License-Identifier: Apache-2.0
"""benchmarks.serve.near_ties: which outputs are looked at, where they part, and what counts as a near-tie."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.common.methods import parse_method
from benchmarks.common.records import RawFile
from benchmarks.serve import near_ties
from benchmarks.serve.near_ties import Gap, Place

CONFIDENCE = parse_method("confidence")


def raw_file(folder: Path, rows: list[tuple[str, str, str]], batch: int = 1) -> RawFile:
    path = folder / "x.raw.jsonl"
    lines = [{"run": 0, "settings": {"batch": batch}}]
    lines += [{"prompt": prompt, "method": method, "output": output} for prompt, method, output in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return RawFile(path)


def test_only_prompts_with_both_outputs_are_compared(tmp_path):
    rows = [("a", "off", "1"), ("a", "confidence", "1"), ("b", "off", "1"), ("b", "confidence", "2"), ("c", "off", "1")]
    assert near_ties.differing(raw_file(tmp_path, rows), CONFIDENCE) == ["b"]


@pytest.mark.parametrize(("batch", "method", "message"), [(2, "confidence", "batch 1"), (1, "entropy", "no prompt")])
def test_a_file_that_cannot_be_compared_is_refused(tmp_path, batch, method, message):
    raw = raw_file(tmp_path, [("a", "off", "1"), ("a", "confidence", "2")], batch)
    with pytest.raises(ValueError, match=message):
        near_ties.differing(raw, parse_method(method))


def test_first_difference_gives_the_common_prefix():
    place = near_ties.first_difference("p", [9, 8], [1, 2, 3, 4], [1, 2, 5, 4])
    assert place == Place("p", [9, 8, 1, 2], 2, 3, 5)
    assert near_ties.first_difference("p", [9], [1, 2], [1, 2]) is None
    assert near_ties.first_difference("p", [9], [1, 2], [1, 2, 3]) is None


@pytest.mark.parametrize("value", [0.75, 1.0, 1.99, 17.3, 31.9, 32.0, 200.0])
def test_spacing_is_that_of_torch(value):
    here = torch.tensor(value).bfloat16()
    after = torch.nextafter(here, torch.tensor(float("inf"), dtype=torch.bfloat16))
    expected = float(after - here)
    assert near_ties.bfloat16_spacing(float(here)) == expected


@pytest.mark.asks(19)
def test_a_large_gap_is_no_near_tie(tmp_path):
    place = Place("p", [1], 0, 2, 3)
    tie, real = Gap(place, 0.0, 0.25, 0.125), Gap(place, 0.0, 0.75, 0.125)
    assert tie.near_tie and not real.near_tie
    page = near_ties.report([tie, real], 20, 3, CONFIDENCE, "command")
    assert "3 of 20" in page and "2 differ, and 1 of" in page and "**no**" in page


def test_user_errors_are_one_line(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("mine")
    rest = ["--pair", "T", "D", "--data", str(tmp_path)]
    assert near_ties.main([str(tmp_path / "none.raw.jsonl"), *rest, "--out", str(page)]) == 2
    assert "pass --force" in capsys.readouterr().err
    assert page.read_text() == "mine"
    assert near_ties.main([str(tmp_path / "none.raw.jsonl"), *rest, "--out", str(tmp_path / "new.md")]) == 2
    assert "is missing" in capsys.readouterr().err
