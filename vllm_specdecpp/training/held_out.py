# SPDX-License-Identifier: Apache-2.0
"""Which prompts a head has not seen: its own ``provenance.json`` says what it was trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_specdecpp.training.manifest import Manifest
from vllm_specdecpp.training.prompts import split_by_id
from vllm_specdecpp.training.shards import Dataset

PROVENANCE_FILE = "provenance.json"


@dataclass(frozen=True)
class TrainingData:
    """What a head was trained on."""

    datasets: frozenset[str]
    """Of each dataset the digest of its prompts, which is the same for all datasets that were collected on them."""

    validation: float
    """Share of the prompts that was held out of training."""

    seed: int
    """Of that choice."""

    def covers(self, manifest: Manifest) -> bool:
        """Whether a dataset has the prompts that the head was trained and validated on."""
        return _identity(asdict(manifest)) in self.datasets

    def is_validation(self, prompt_id: str) -> bool:
        """Whether a prompt of such a dataset was held out of training."""
        return self.validation > 0 and split_by_id(prompt_id, self.validation, self.seed)


def training_data(head: Path) -> TrainingData | None:
    """What ``provenance.json`` in a head's folder says; None if there is none, as beside a released head.

    Raises:
        ValueError: one line: the file is damaged.
    """
    path = head / PROVENANCE_FILE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        datasets = frozenset(_identity(entry["manifest"]) for entry in content["data"])
        return TrainingData(datasets, float(content["validation"]), int(content["seed"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"specdecpp: {path} does not say what the head was trained on ({type(error).__name__}: {error}); "
            "restore it, or train the head again"
        ) from None


def prompts_of(datasets: Sequence[Dataset]) -> set[tuple[str, str]]:
    """(id, set) of all prompts."""
    return {(p["id"], p["set"]) for dataset in datasets for shard in dataset.shards() for p in shard.prompts}


def refuse_seen(fit: Sequence[Dataset], evaluate: Sequence[Dataset], trained: TrainingData | None) -> None:
    """Refuse to judge a head by prompts that it was trained, validated or calibrated on.

    A dataset that the head was trained on is known by the digest of its prompts; single prompts of it that went into
    another dataset are found if the training data is among ``fit``.

    Raises:
        ValueError: one line naming the folder and a prompt.
    """
    for dataset in evaluate:
        if trained is not None and trained.covers(dataset.manifest):
            raise ValueError(
                f"specdecpp: evaluate={dataset.folder} has the prompts that the head was trained on; give held-out ones"
            )
    seen = prompts_of(fit) if evaluate else set()
    for dataset in evaluate:
        if common := sorted(seen & prompts_of([dataset])):
            name, in_set = common[0]
            raise ValueError(
                f"specdecpp: evaluate={dataset.folder} shares {len(common)} prompts with fit (e.g. {name!r} of "
                f"{in_set!r}), so the head may have been trained on them, and is calibrated on them; give held-out ones"
            )


def _identity(manifest: dict[str, Any]) -> str:
    """The digest of the prompts; a server's traffic has none: its manifest as a whole stands for it."""
    return str(manifest["prompts_digest"]) or json.dumps(manifest, sort_keys=True)
