# SPDX-License-Identifier: Apache-2.0
"""Prompts to collect labels on: from a JSON lines file, a text file or a Hugging Face dataset."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

COLUMNS = ("prompt", "instruction", "question", "text")
"""Where the prompt stands if nobody says, the first that is there."""
PromptName = tuple[str, str]
"""(id, set)."""
_FILES = (".jsonl", ".txt")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.+-]+)?")


@dataclass(frozen=True)
class Prompt:
    """One user message."""

    id: str
    """Unique within its source."""

    set: str
    """Name of the task or corpus that results are reported by."""

    text: str
    """What the user says; a chat template comes on top."""


def load_prompts(
    source: str | Path, limit: int | None = None, split: str = "train", column: str | None = None
) -> list[Prompt]:
    """Read prompts.

    Args:
        source: a ``.jsonl`` file ({"prompt"} a line; "id" and "set" are optional), a ``.txt`` file (one a line), or a
            Hugging Face dataset as ``org/name``, ``org/name:config`` or a folder. Empty lines are skipped.
        limit: the first so many; None takes all.
        split: of a Hugging Face dataset.
        column: where the text stands; by default the first of :data:`COLUMNS` that is there.

    Raises:
        ValueError: one line naming file and line: nothing there, not what it should be, no text, or an id twice.
    """
    name = str(source)
    path = Path(name).expanduser()
    if path.suffix in _FILES or path.is_file():
        found = _from_file(path, column)
    elif path.is_dir() or _HUB_ID.fullmatch(name):
        found = _from_hub(name, split, column)
    else:
        raise ValueError(f"specdecpp: prompts={name!r} does not exist; give a .jsonl or .txt file, or a dataset id")
    prompts = list(_unique(islice(found, limit), name))
    if not prompts:
        raise ValueError(f"specdecpp: prompts={name!r} holds no prompts; give a source with one a line")
    return prompts


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a user's message in the model's chat template; of the plain text if it has none."""
    if getattr(tokenizer, "chat_template", None) is None:
        return list(tokenizer.encode(text))
    message = [{"role": "user", "content": text}]
    templated = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return list(tokenizer.encode(templated, add_special_tokens=False))


def digest(prompts: Sequence[Prompt]) -> str:
    """The same for the same prompts in the same order."""
    return hashlib.sha256(json.dumps([astuple(prompt) for prompt in prompts]).encode()).hexdigest()


def split_by_id(prompt_id: str, fraction: float, seed: int) -> bool:
    """Whether a prompt is held out: always the same answer, whatever the other prompts are.

    Args:
        prompt_id: of the prompt.
        fraction: of all prompts, that is held out: 0 to 1.
        seed: another one holds out others.
    """
    digest = hashlib.sha256(f"{seed}:{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _unique(prompts: Iterable[Prompt], name: str) -> Iterator[Prompt]:
    seen = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise ValueError(f"specdecpp: prompts={name!r}: the id {prompt.id!r} is there twice; make the ids differ")
        seen.add(prompt.id)
        yield prompt


def _from_file(path: Path, column: str | None) -> Iterator[Prompt]:
    if path.suffix not in _FILES:
        raise ValueError(f"specdecpp: prompts={str(path)!r} is neither .jsonl nor .txt; convert or rename it")
    try:
        # Not splitlines(): JSON may hold a bare U+2028, which that would split at.
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ValueError(
            f"specdecpp: prompts={str(path)!r} cannot be read ({error.strerror}); check the path"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"specdecpp: prompts={str(path)!r} is not UTF-8 ({error}); convert it") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        default_id = f"{path.stem}-{number}"
        if path.suffix == ".txt":
            yield Prompt(default_id, path.stem, line.strip())
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"specdecpp: prompts {where}, is not valid JSON ({error}); mend the line") from None
        if not isinstance(row, dict):
            raise ValueError(f'specdecpp: prompts {where}, must be an object like {{"prompt": "..."}}; mend the line')
        text = _text(row, _column(row, column, where), where)
        yield Prompt(str(row.get("id", default_id)), str(row.get("set", path.stem)), text)


def _from_hub(name: str, split: str, column: str | None) -> Iterator[Prompt]:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"specdecpp: prompts={name!r} as a Hugging Face dataset needs the datasets library; "
            "in the clone: pip install '.[train]', or give a .jsonl file"
        ) from None
    path, _, config = (name, "", "") if Path(name).expanduser().is_dir() else name.partition(":")
    try:
        rows = datasets.load_dataset(str(Path(path).expanduser()), config or None, split=split)
    except Exception as error:  # the library raises its own, the hub client's and OS errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"specdecpp: prompts={name!r}, split={split!r}, cannot be loaded ({reason}); check the name, "
            "the config and the split"
        ) from None
    label = Path(path).name
    for number, row in enumerate(rows):
        where = f"{name}, row {number}"
        yield Prompt(f"{label}-{split}-{number}", label, _text(row, _column(row, column, where), where))


def _column(row: dict[str, Any], column: str | None, where: str) -> str:
    wanted = COLUMNS if column is None else (column,)
    for name in wanted:
        if name in row:
            return name
    raise ValueError(
        f"specdecpp: prompts {where}, has no {' or '.join(wanted)}, but {', '.join(map(str, row)) or 'nothing'}; "
        "name the column with --column"
    )


def _text(row: dict[str, Any], column: str, where: str) -> str:
    text = row[column]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"specdecpp: prompts {where}: {column}={text!r:.60} is no text; mend it or leave the line out")
    return text
