# SPDX-License-Identifier: Apache-2.0
"""Committed results: tables are what their raw rows give, and README and docs repeat them as they are."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.campaign.report import cells_of, markdown
from benchmarks.common.records import RawFile

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"
CAMPAIGNS = [
    path for path in sorted(RESULTS.glob("*.raw.jsonl")) if "cells" in json.loads(path.read_text().splitlines()[0])
]
COPIED = re.compile(r"<!-- from (\S+) -->\n\n(.*?)\n\n<!-- end -->", re.DOTALL)
"""A table in a document, and the file of results that it is copied from."""


@pytest.mark.parametrize("path", CAMPAIGNS, ids=lambda path: path.name)
def test_the_table_is_that_of_the_raw_rows(path: Path) -> None:
    raw = RawFile(path)
    last = raw.runs[-1]
    table = Path(str(path).replace(".raw.jsonl", ".md")).read_text()
    judged = re.search(r"ratios of (\S+),", table)
    assert judged
    assert markdown(cells_of(raw.rows, last["cells"], last["families"]), raw.runs, judged[1]) == table


def copied_tables() -> list[tuple[str, str, str]]:
    """(document, results file, lines of the table) of every copied table."""
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [(d.name, *found) for d in documents for found in COPIED.findall(d.read_text())]


def test_copied_tables_are_what_the_results_say() -> None:
    tables = copied_tables()
    assert any(document == "README.md" for document, *_ in tables)
    for document, source, lines in tables:
        there = (ROOT / source).read_text().splitlines()
        for line in lines.splitlines():
            assert line in there, f"{document}: {line!r} is not in {source}"
