# SPDX-License-Identifier: Apache-2.0
"""Which prompts a head has not seen: the ``provenance.json`` beside it lists those that it has."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_specdecpp.data.prompts import PromptName, split_by_id
from vllm_specdecpp.data.shards import Dataset
from vllm_specdecpp.training.collect.responses import read_responses

PROVENANCE_FILE = "provenance.json"


@dataclass(frozen=True)
class TrainingData:
    """The prompts of a head's training, by :func:`name_digest`."""

    fitted: frozenset[str] = frozenset()
    """Trained on: the head scores them too well."""

    held_out: frozenset[str] = frozenset()
    """Training ended early by them."""

    def was_fitted_to(self, prompt: PromptName) -> bool:
        """Whether the head was trained on a prompt."""
        return name_digest(prompt) in self.fitted

    def knows(self, prompt: PromptName) -> bool:
        """Whether a prompt was used in training, be it for early stopping."""
        return name_digest(prompt) in self.fitted | self.held_out


def training_data(head: Path) -> TrainingData:
    """What ``provenance.json`` in a head's folder says; nothing if there is none, as beside a released head.

    Raises:
        ValueError: one line: the file is damaged.
    """
    path = head / PROVENANCE_FILE
    if not path.exists():
        return TrainingData()
    try:
        lists = json.loads(path.read_text(encoding="utf-8"))["prompts"]
        return TrainingData(frozenset(lists["fitted"]), frozenset(lists["held_out"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
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
        found["held_out" if split_by_id(prompt[0], validation, seed) else "fitted"].append(name_digest(prompt))
    return found


def prompts_of(datasets: Sequence[Dataset]) -> set[PromptName]:
    """(id, set) of all prompts."""
    return {(p["id"], p["set"]) for dataset in datasets for shard in dataset.shards() for p in shard.prompts}


def prompt_texts(datasets: Sequence[Dataset]) -> Iterator[tuple[PromptName, str]]:
    """Each prompt whose text the datasets' responses hold, and a digest of its token ids.

    Raises:
        ValueError: one line: a responses file is damaged.
    """
    for dataset in datasets:
        for row in read_responses(dataset.folder):
            text = json.dumps(row["prompt_token_ids"]).encode()
            yield (row["id"], row["set"]), hashlib.sha256(text).hexdigest()


def refuse_seen(evaluate: Sequence[Dataset], data: Sequence[Dataset], trained: TrainingData, option: str) -> None:
    """Refuse to judge by prompts that something was fitted to: it would look better than it is.

    Args:
        evaluate: datasets to judge by.
        data: datasets that something is fitted to now; all of their prompts count.
        trained: of the head.
        option: that names ``data``, for the message.

    Raises:
        ValueError: one line: the head's training used a prompt, or it is among the data, by its id and set or, where
            the datasets hold the texts, word for word under another name.
    """
    seen = prompts_of(data) if evaluate else set()
    texts = {text: prompt for prompt, text in prompt_texts(data)} if evaluate else {}
    for dataset in evaluate:
        here = prompts_of([dataset])
        used = [(prompt, prompt) for prompt in sorted(here) if trained.knows(prompt)]
        common = [(prompt, prompt) for prompt in sorted(here & seen)]
        twins = sorted((prompt, texts[text]) for prompt, text in prompt_texts([dataset]) if text in texts)
        for found, what in ((used, "what the head was trained on"), (common or twins, f"--{option}")):
            if found:
                (name, in_set), twin = found[0]
                alias = "" if twin == (name, in_set) else f", there {twin[0]!r} of {twin[1]!r}"
                raise ValueError(
                    f"specdecpp: evaluate={dataset.folder} shares {len(found)} prompts with {what} (e.g. {name!r} of "
                    f"{in_set!r}{alias}); give held-out ones"
                )
