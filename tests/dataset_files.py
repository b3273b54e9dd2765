# SPDX-License-Identifier: Apache-2.0
"""Shards of known shapes, and dataset folders of them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_specdecpp.data.manifest import Manifest
from vllm_specdecpp.data.shard_file import RoundRecord, Shard, shard_from_rounds, write_shard
from vllm_specdecpp.data.shards import Dataset, create_dataset

HIDDEN_SIZE = 5
SETTINGS: dict[str, Any] = {
    "target": "org/target", "draft": "org/draft", "target_revision": None, "draft_revision": "abc",
    "hidden_size": HIDDEN_SIZE, "source": "on-policy", "sampling": {"temperature": 0.0, "top_k": 0},
    "num_candidates": 6, "prompts_digest": "d", "num_prompts": 7, "unit_size": 2, "versions": {"torch": "1"},
    "git": "g", "command": "c", "created": "t",
}  # fmt: skip


def make_manifest(**changes: Any) -> Manifest:
    """Of ``SETTINGS``, some changed."""
    return Manifest(**{**SETTINGS, **changes})


def make_round(
    rnd: random.Random, request_id: str, drafted: int, verified: int, accepted: int, **changes: Any
) -> RoundRecord:
    """A round with random contents."""
    torch.manual_seed(rnd.randrange(1 << 30))
    fields: dict[str, Any] = {
        "request_id": request_id,
        "hidden_states": torch.randn(drafted, HIDDEN_SIZE).bfloat16(),
        "token_ids": [rnd.randrange(100) for _ in range(drafted)],
        **{name: torch.rand(drafted) for name in ("top1_prob", "entropy", "margin", "soft_label")},
        "num_accepted": accepted, "num_verified": verified, "emitted": rnd.randrange(50), "temperature": 0.5,
    }  # fmt: skip
    return RoundRecord(**{**fields, **changes})


ROUNDS = [("b", 3, 3, 1), ("a", 6, 4, 4), ("b", 1, 1, 0), ("b", 2, 0, 0), ("x", 2, 2, 1), ("a", 5, 5, 2)]
PROMPTS = {"a": {"id": "a-1", "set": "alpaca", "more": "left out"}, "b": {"id": "b-1", "set": "gsm8k"}}


def make_rounds() -> list[RoundRecord]:
    rnd = random.Random(1)
    return [make_round(rnd, *shape) for shape in ROUNDS]


def make_shard() -> Shard:
    """Of ``ROUNDS``: 4 of prompts that are wanted, 13 candidates."""
    return shard_from_rounds(make_rounds(), PROMPTS)


def make_dataset(folder: Path, units: int = 1, **changes: Any) -> Dataset:
    """With the same shard in every unit."""
    dataset = create_dataset(folder, make_manifest(**changes), False)
    for unit in range(units):
        write_shard(dataset.shard_path(unit), make_shard(), dataset.manifest)
    return dataset


def files_in(folder: Path) -> dict[str, bytes]:
    """Path → contents of all files."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(match: str) -> Any:
    """Expects a ValueError in one line of ours."""
    return pytest.raises(ValueError, match=f"^specdecpp: [^\n]*{match}[^\n]*$")
