# SPDX-License-Identifier: Apache-2.0
"""The target's answers to a unit's prompts, beside its shard: ``responses/NNNNN.jsonl``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_specdecpp.files import write_whole


def write_responses(folder: Path, unit: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a unit's answers, ``{"id", "set", "prompt_token_ids", "token_ids"}`` each, whole or not at all.

    Raises:
        ValueError: the disk is full, or the file cannot be written.
    """
    content = "".join(json.dumps(row) + "\n" for row in rows)
    write_whole(folder / "responses" / f"{unit:05d}.jsonl", content.encode())


def read_responses(folder: Path) -> Iterator[dict[str, Any]]:
    """The answers of all units of a dataset; none if it holds none.

    Raises:
        ValueError: one line naming the file: it is damaged.
    """
    for path in sorted((folder / "responses").glob("*.jsonl")):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                yield {key: row[key] for key in ("id", "set", "prompt_token_ids", "token_ids")}
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"specdecpp: {path}, line {number}, is damaged; remove the file and run the same command again"
                ) from None
