# SPDX-License-Identifier: Apache-2.0
"""Known target models and the draft (and acceptance head) that fits each; users add theirs in a file."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from vllm_specdecpp.files import read_json

BUILT_IN_FILE = Path(__file__).with_name("pairs.json")
DEFAULT_USER_FILE = Path("~/.config/vllm-specdecpp/pairs.json")
USER_FILE_VARIABLE = "SPECDECPP_PAIRS"


class Pair(BaseModel):
    """A target model with the draft model and head to use for it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    target: str = ""
    """Hub id or folder of the target model: the entry's name in the file."""

    draft: str = Field(min_length=1)
    """Hub id or folder of the draft model."""

    head: str | None = Field(default=None, min_length=1)
    """Acceptance head as the option ``head`` takes it; None for a training-free rule."""

    like: tuple[str, int, int, int] | None = Field(default=None, strict=False)
    """What tells a copy of the target (quantised, fine-tuned, renamed) by its configuration: ``model_type``,
    ``hidden_size``, ``num_hidden_layers``, ``vocab_size``."""

    def fits(self, config: Mapping[str, Any]) -> bool:
        """Whether a ``config.json`` is of a copy of the target; its vocabulary may have grown or shrunk by 2 %."""
        if self.like is None:
            return False
        names = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
        *shape, num_rows = (config.get(name) for name in names)
        return shape == list(self.like[:3]) and isinstance(num_rows, int) and abs(num_rows / self.like[3] - 1) <= 0.02


def known_pairs() -> dict[str, Pair]:
    """The built-in pairs and the user's, by target; the user's win, whatever the case of the name.

    The user's file is a JSON object ``{target: {"draft": ..., "head": ...}}``: the one that the variable
    ``SPECDECPP_PAIRS`` names, else ``~/.config/vllm-specdecpp/pairs.json`` if there is one.

    Raises:
        ValueError: one line naming the file: it was asked for and is missing, or it is malformed.
    """
    pairs = _read(BUILT_IN_FILE)
    path, asked_for = _user_file()
    if asked_for or path.exists():
        own = _read(path)
        overridden = {target.lower() for target in own}
        pairs = {target: pair for target, pair in pairs.items() if target.lower() not in overridden} | own
    return pairs


def find_pair(target: str) -> Pair:
    """The pair of a target model.

    Args:
        target: a hub id (any case) or a local folder. A folder goes by the hub id that its ``source.json`` names
            (``make demo`` leaves one), else by its last name, or as a folder of the hub's cache.
            What no name tells goes by its configuration: of several pairs that fit, the one whose target's name has
            most in common with it. That both have the same tokens is checked when the engine starts.

    Returns:
        The pair; where a copy of the draft lies beside a local target, that folder is the draft.

    Raises:
        ValueError: an unknown target (the message lists the known ones and shows the JSON to write), or a bad file.
    """
    pairs = known_pairs()
    by_name = {name.lower().rstrip("/"): pair for name, pair in pairs.items()}
    if pair := by_name.get(target.lower().rstrip("/")):
        return pair
    if _is_local(target):
        folder = Path(target).expanduser().absolute()
        parts = [part.lower() for part in folder.parts]
        for name, pair in by_name.items():
            if _is_copy(folder, name) or f"models--{name.replace('/', '--')}" in parts:
                return pair.model_copy(update={"draft": _beside(folder, pair.draft)})
    config = _config(target)
    if found := [pair for pair in pairs.values() if pair.fits(config)]:
        words = _words(Path(target).expanduser().absolute().name if _is_local(target) else target)
        pair = max(found, key=lambda pair: len(words & _words(pair.target)) / len(_words(pair.target)))
        return pair.model_copy(update={"draft": _beside(Path(target), pair.draft)}) if _is_local(target) else pair
    option = json.dumps({"method": "specdecpp", "model": "DRAFT"})
    near = difflib.get_close_matches(target, pairs, n=3, cutoff=0)
    entry = json.dumps({target: {"draft": "DRAFT", "head": None}})
    raise ValueError(
        f"specdecpp: no draft is known for target {target!r}; {len(pairs)} are, the nearest {', '.join(near)}; name "
        f"one with --speculative-config '{option}', or write {entry} to {_user_file()[0]}"
    )


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z0-9.]+", name.lower()))


def _config(target: str) -> dict[str, Any]:
    """``config.json`` of a folder or a hub id, of its language model where it has several; empty if there is none."""
    path = Path(target).expanduser() / "config.json"
    try:
        if not path.is_file():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(target, "config.json"))
        config = json.loads(path.read_text(encoding="utf-8"))
        return config.get("text_config") or config
    except Exception:  # whatever the hub's client raises: no such name, no network, not allowed
        return {}


def _is_local(target: str) -> bool:
    return target.startswith(("/", "./", "../", "~")) or Path(target).is_dir()


def _is_copy(folder: Path, hub_id: str) -> bool:
    """Whether a folder holds the model of a hub id, in any case."""
    try:
        origin = json.loads((folder / "source.json").read_text(encoding="utf-8"))
        named = origin.get("hub") or origin.get("same_model_on_the_hub")
    except (OSError, ValueError, AttributeError):
        named = None
    if isinstance(named, str):
        return named.lower() == hub_id.lower()
    return folder.name.lower() == hub_id.lower().rsplit("/", 1)[-1]


def _beside(target: Path, draft: str) -> str:
    """The folder beside the target's that holds the draft; without one, the draft's id."""
    with contextlib.suppress(OSError):
        for folder in sorted(target.parent.iterdir()):
            if (folder / "config.json").is_file() and _is_copy(folder, draft):
                return str(folder)
    return draft


def _user_file() -> tuple[Path, bool]:
    """The user's file, and whether it was named explicitly."""
    if named := os.environ.get(USER_FILE_VARIABLE):
        return Path(named).expanduser(), True
    return DEFAULT_USER_FILE.expanduser(), False


def _read(path: Path) -> dict[str, Pair]:
    example = '{"TARGET": {"draft": "DRAFT", "head": null}}'
    mend = f"mend it ({example}), set {USER_FILE_VARIABLE} to another one, or unset it"
    return {target: pair.model_copy(update={"target": target}) for target, pair in read_json(path, _FILE, mend).items()}


_FILE: TypeAdapter[dict[str, Pair]] = TypeAdapter(dict[str, Pair])
