# SPDX-License-Identifier: Apache-2.0
"""Two servers under load: which requests each gets, going on, and the report; the servers only count."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.records import RawFile
from benchmarks.serve import load
from tests.benchmark_rows import write_prompts

ASKED: list[tuple[str, float, tuple[str, ...]]] = []


def fake_ask(url: str, tokenizer: str, prompts: Any, rate: float, max_tokens: int, seed: int) -> dict[str, Any]:
    ASKED.append((url, rate, tuple(row["id"] for row in prompts)))
    if len(ASKED) == 3:
        raise ValueError("2 of 4 requests failed at 2 requests/s")
    seconds = 0.5 if url == "ours" else 1.0
    return {"duration": 1.0, "completed": 4, "total_output_tokens": 8, **dict.fromkeys(load.FIGURES, seconds)}


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for name in ("a", "b"):
        write_prompts(tmp_path, name, 8)

    @contextmanager
    def server(settings: Any, speculative: Any, log: Path) -> Iterator[str]:
        yield "ours" if speculative else "plain"

    ASKED.clear()
    monkeypatch.setattr(load, "server", server)
    monkeypatch.setattr(load, "ask", fake_ask)
    parts = ["--pair", "T", "D", "--data", str(tmp_path), "--sets", "a", "b", "--prompts", "4", "--turns", "2"]
    return [*parts, "--rates", "1", "2", "--out", str(tmp_path / "x.jsonl")]


def test_it_goes_on_after_a_failure_and_reports(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load.main(command) == 2
    assert "2 of 4 requests failed" in capsys.readouterr().err
    assert load.main(command) == 0
    assert len(ASKED) == 1 + 2 * 2 * 2
    loads = {(url, rate, ids) for url, rate, ids in ASKED}
    prompts = {url: [ids for u, _, ids in loads if u == url] for url in ("plain", "ours")}
    assert sorted(prompts["plain"]) == sorted(prompts["ours"])  # both get the same
    assert len({id_ for ids in prompts["ours"] for id_ in ids}) == 16  # and each load has its own
    table = (tmp_path / "x.md").read_text()
    assert "| 2 | 1 | 1, 0.5: **0.50** |" in table and "| requests/s | turn | tokens/s |" in table
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert load.main(command) == 2  # nothing is overwritten


def test_a_load_of_one_server_is_not_reported(command: list[str], tmp_path: Path) -> None:
    load.main([*command, "--rates", "1"])
    raw = RawFile(tmp_path / "x.raw.jsonl")
    assert len(raw.rows) == 2 and set(load.pairs(raw)) == {(1.0, "0")}
    raw.rows.pop()
    with pytest.raises(ValueError, match="no load was finished by both"):
        load.pairs(raw)
