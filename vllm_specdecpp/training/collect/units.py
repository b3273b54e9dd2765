# SPDX-License-Identifier: Apache-2.0
"""One unit of a collection: the prompts of one shard."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
