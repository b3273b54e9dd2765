# SPDX-License-Identifier: Apache-2.0
"""Which prompts a head has not seen: its own ``provenance.json`` says what it was trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_specdecpp.data.manifest import Manifest
from vllm_specdecpp.data.prompts import split_by_id
from vllm_specdecpp.data.shards import Dataset

PROVENANCE_FILE = "provenance.json"
PromptName = tuple[str, str]
"""(id, set)."""


@dataclass(frozen=True)
class TrainingData:
    """What a head was trained on."""

    datasets: frozenset[str]
    """Of each dataset the digest of its prompts, which is the same for all datasets that were collected on them."""

    validation: float
    """Share of the prompts that was held out of training."""

    seed: int
    """Of that choice."""

    fitted: frozenset[str] = frozenset()
    """:func:`name_digest` of each prompt that was trained on; empty where the file is older than this list."""

    held_out: frozenset[str] = frozenset()
    """Likewise of each that training ended early by."""

    def covers(self, manifest: Manifest) -> bool:
        """Whether a dataset has the prompts that the head was trained and validated on."""
        return _identity(asdict(manifest)) in self.datasets

    def is_validation(self, prompt_id: str) -> bool:
        """Whether a prompt of such a dataset was held out of training."""
        return self.validation > 0 and split_by_id(prompt_id, self.validation, self.seed)

    def was_fitted_to(self, manifest: Manifest, prompt: PromptName) -> bool:
        """Whether the head was trained on a prompt of a dataset, which it scores too well."""
        if name_digest(prompt) in self.fitted:
            return True
        return self.covers(manifest) and not self.is_validation(prompt[0])

    def knows(self, prompt: PromptName) -> bool:
        """Whether a prompt was used in training, be it for early stopping; of an older head that is not known."""
        return name_digest(prompt) in self.fitted | self.held_out


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
        lists = content.get("prompts", {})
        fitted, held_out = (frozenset(map(_text, lists.get(name, ()))) for name in ("fitted", "held_out"))
        return TrainingData(datasets, float(content["validation"]), int(content["seed"]), fitted, held_out)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"specdecpp: {path} does not say what the head was trained on ({type(error).__name__}: {error}); "
            "restore it, or train the head again"
        ) from None


def name_digest(prompt: PromptName) -> str:
    """What ``provenance.json`` keeps of a prompt's name: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(prompt).encode()).hexdigest()[:16]


def prompt_lists(prompts: Iterable[PromptName], validation: float, seed: int) -> dict[str, list[str]]:
    """The ``prompts`` of ``provenance.json``: a head's training data can be told without the datasets."""
    found: dict[str, list[str]] = {"fitted": [], "held_out": []}
    for prompt in sorted(prompts):
        held_out = validation > 0 and split_by_id(prompt[0], validation, seed)
        found["held_out" if held_out else "fitted"].append(name_digest(prompt))
    return found


def prompts_of(datasets: Sequence[Dataset]) -> set[PromptName]:
    """(id, set) of all prompts."""
    return {(p["id"], p["set"]) for dataset in datasets for shard in dataset.shards() for p in shard.prompts}


def refuse_trained_on(evaluate: Sequence[Dataset], trained: TrainingData | None) -> None:
    """Refuse to judge a head by prompts that it was trained or validated on.

    Raises:
        ValueError: one line naming the folder, and a prompt where single ones are known.
    """
    for dataset in evaluate if trained is not None else ():
        assert trained is not None
        if trained.covers(dataset.manifest):
            raise ValueError(
                f"specdecpp: evaluate={dataset.folder} has the prompts that the head was trained on; give held-out ones"
            )
        if known := sorted(filter(trained.knows, prompts_of([dataset]))):
            name, in_set = known[0]
            raise ValueError(
                f"specdecpp: evaluate={dataset.folder} shares {len(known)} prompts with what the head was trained on "
                f"(e.g. {name!r} of {in_set!r}); give held-out ones"
            )


def refuse_seen(fit: Sequence[Dataset], evaluate: Sequence[Dataset], trained: TrainingData | None) -> None:
    """Refuse to judge a head by prompts that it was trained, validated or calibrated on.

    Raises:
        ValueError: one line naming the folder and a prompt.
    """
    refuse_trained_on(evaluate, trained)
    seen = prompts_of(fit) if evaluate else set()
    for dataset in evaluate:
        if common := sorted(seen & prompts_of([dataset])):
            name, in_set = common[0]
            raise ValueError(
                f"specdecpp: evaluate={dataset.folder} shares {len(common)} prompts with fit (e.g. {name!r} of "
                f"{in_set!r}), so the head may have been trained on them, and is calibrated on them; give held-out ones"
            )


def _text(value: object) -> str:
    """A digest of the list; TypeError if it is none."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no digest of a prompt")
    return value


def _identity(manifest: dict[str, Any]) -> str:
    """The digest of the prompts; a server's traffic has none: its manifest as a whole stands for it."""
    return str(manifest["prompts_digest"]) or json.dumps(manifest, sort_keys=True)
