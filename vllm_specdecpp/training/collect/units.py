# SPDX-License-Identifier: Apache-2.0
"""One unit of a collection: the prompts of one shard, and the files that they give."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vllm_specdecpp.files import write_whole

if TYPE_CHECKING:
    from vllm_specdecpp.data.prompts import Prompt


@dataclass(frozen=True)
class UnitSummary:
    """What one unit gave."""

    unit: int
    prompts: int
    skipped: int
    """Prompts too long for ``max_model_len``."""
    tokens: int
    """Answered."""
    rounds: int
    steps: int
    """Candidates drafted and verified."""
    observed: int
    """Of those with a known outcome."""
    accepted: int
    seconds: float


class Collector(Protocol):
    """Writes the shard and the responses of a unit: ``on_policy.OnPolicyCollector``, ``paper.PaperCollector``."""

    def collect(self, unit_index: int, prompts: list[Prompt]) -> UnitSummary:
        """Write one unit, replacing it if it is there."""

    def close(self) -> None:
        """Free the models."""


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a user's message in the model's chat template; of the plain text if it has none."""
    if getattr(tokenizer, "chat_template", None) is None:
        return list(tokenizer.encode(text))
    message = [{"role": "user", "content": text}]
    templated = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return list(tokenizer.encode(templated, add_special_tokens=False))


def shard_path(folder: Path, unit: int) -> Path:
    """Where a unit's shard lies."""
    return folder / "shards" / f"{unit:05d}.safetensors"


def write_responses(folder: Path, unit: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a unit's ``responses/NNNNN.jsonl``, whole or not at all.

    Raises:
        ValueError: the disk is full, or the file cannot be written.
    """
    content = "".join(json.dumps(row) + "\n" for row in rows)
    write_whole(folder / "responses" / f"{unit:05d}.jsonl", content.encode())
