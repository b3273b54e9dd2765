# SPDX-License-Identifier: Apache-2.0
"""Prompts in, raw rows out: what a run measures and the append-only file that makes it resumable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def load_prompts(folder: Path, sets: Sequence[str], count: int) -> dict[str, list[Row]]:
    """First ``count`` prompts of every set, from ``eval_SET.jsonl`` with keys ``id``, ``set``, ``prompt``.

    Raises:
        ValueError: a set's file is missing or holds fewer prompts than asked for.
    """
    prompts: dict[str, list[Row]] = {}
    for name in sets:
        path = folder / f"eval_{name}.jsonl"
        if not path.exists():
            there = sorted(p.stem.removeprefix("eval_") for p in folder.glob("eval_*.jsonl"))
            raise ValueError(f"--sets {name}: {path} is missing; {folder} has {', '.join(there) or 'no eval_*.jsonl'}")
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if len(rows) < count:
            raise ValueError(f"--prompts {count}: {path} holds only {len(rows)}")
        prompts[name] = rows[:count]
    return prompts


def make_groups(rows: Sequence[Row], batch: int) -> list[Sequence[Row]]:
    """Groups of ``batch`` prompts; a smaller last one is left out, since it would measure another batch size."""
    return [rows[i : i + batch] for i in range(0, len(rows) - batch + 1, batch)]


def unit_id(unit: Sequence[Row]) -> str:
    """Name of a unit in the raw rows: its prompts' ids."""
    return "+".join(str(prompt["id"]) for prompt in unit)


def output_hash(outputs: Iterable[Sequence[int]]) -> str:
    """Digest of the generated token ids, to see whether two methods gave the same output."""
    return hashlib.sha256(json.dumps([list(ids) for ids in outputs]).encode()).hexdigest()[:16]


def write_files(out: Path, rows: Sequence[Row], page: str) -> None:
    """The result rows, and beside them the page (.md)."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out.with_suffix(".md").write_text(page, encoding="utf-8")


class RawFile:
    """Append-only JSON lines: one ``run`` row for each start of the program, one row for each (unit, method).

    Nothing is ever rewritten; only a half-written last line of a killed run is cut off when the file is opened again.
    """

    def __init__(self, path: Path):
        self.path = path
        self.runs: list[Row] = []
        self.rows: list[Row] = []
        self._cut_at: int | None = None
        if path.exists():
            self._read()

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.decode("utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                raise ValueError(f"{self.path} line {number} is not JSON; remove the line or the file") from None
            (self.runs if "run" in row else self.rows).append(row)
        if len(whole) < len(data):
            self._cut_at = len(whole)

    def start_run(self, settings: Row, provenance: Row) -> None:
        """Note a new start; ValueError if the rows that are there were measured with other settings."""
        for run in self.runs:
            for key, value in settings.items():
                if run["settings"].get(key) != value:
                    raise ValueError(
                        f"{self.path} was measured with {key}={run['settings'].get(key)!r}, not {value!r}; "
                        "use another --out, or the same settings to go on"
                    )
        if self._cut_at is not None:
            with self.path.open("r+b") as file:
                file.truncate(self._cut_at)
            self._cut_at = None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        run = {"run": len(self.runs), "settings": settings, **provenance}
        self._append(run)
        self.runs.append(run)

    def add(self, row: Row) -> None:
        """Append one measured row at once."""
        self._append(row)
        self.rows.append(row)

    def done(self, *keys: str) -> set[tuple[Any, ...]]:
        """The (unit, method) pairs measured already, with the values of some more keys of their rows."""
        return {(row["prompt"], row["method"], *(row[key] for key in keys)) for row in self.rows}

    def _append(self, row: Row) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
