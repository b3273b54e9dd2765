# SPDX-License-Identifier: Apache-2.0
"""Which tokens the draft's output layer keeps: those that the target emits most, counted; and all that end a text.

A token that is left out is never proposed (q = 0); the target emits it all the same. Kept ids stand beside the draft's
weights, in the file of ``engine.shared.draft_vocab``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_specdecpp.data.prompts import COLUMNS, json_rows, split_by_id

HELD_OUT = 0.1
_ANSWERS = ("response", "answer", "output")
_SAME_TOKENS = 0.95
"""Share of a text's ids that must come back when it is decoded and encoded again. With another tokenizer many pieces
are still words of its own, but not so many."""
_COMPARED = 2000
"""Ids that are compared so."""


@dataclass(frozen=True)
class Text:
    """Token ids of one counted text."""

    id: str
    given: list[int]
    """Of the prompt."""
    emitted: list[int]
    """Of the answer; empty if only prompts are known."""


@dataclass(frozen=True)
class Kept:
    """Token ids that the draft may propose, ascending, and how much of unseen text they hold."""

    ids: list[int]
    num_texts: int
    held_out_tokens: int
    covered: int

    @property
    def coverage(self) -> str:
        """In words."""
        if not self.held_out_tokens:
            return f"{self.num_texts} counted texts are too few to hold a tenth out: the coverage is unknown"
        share = f"{self.covered / self.held_out_tokens:.2%}"
        return f"{share} of the {self.held_out_tokens} tokens of a held-out tenth of {self.num_texts} texts"


def read_texts(source: Path, tokenizer: Any, num_rows: int) -> Iterator[Text]:
    """The texts of a dataset that ``collect`` made, or of a JSON lines file.

    Args:
        source: a dataset folder, whose answers are the target's own; or a file with a "prompt" or "text" (and a
            "response") a line.
        tokenizer: the draft's.
        num_rows: of the draft's output layer.

    Raises:
        ValueError: one line: nothing there, or ids of another tokenizer.
    """
    if source.is_dir():
        found = from_dataset(source)
        yield from _checked(found, source, tokenizer, num_rows)
    else:
        yield from _from_file(source, tokenizer)


def choose(texts: Iterable[Text], always: set[int], size: int, num_rows: int) -> Kept:
    """The ``size`` most frequent ids; of those that are equally frequent, the lower ones (BPE's earlier merges).

    Nine tenths of the texts are counted, and the rest tells how much of such text the chosen ids hold: of the answers
    where there are any, as only those are drafted.

    Args:
        always: ids that are kept whatever their counts.

    Raises:
        ValueError: one line: more than the model has, or too few for those in ``always``.
    """
    if size > num_rows:
        raise ValueError(f"specdecpp: vocab={size} is more than the draft's {num_rows} rows; give less")
    if size < len(always):
        raise ValueError(f"specdecpp: vocab={size} has no room for the {len(always)} special and stop tokens")
    counts: Counter[int] = Counter()
    held_out: list[Text] = []
    num_texts = 0
    for text in texts:
        num_texts += 1
        if split_by_id(text.id, HELD_OUT, 0):
            held_out.append(text)
        else:
            counts.update(text.given)
            counts.update(text.emitted)
    if not num_texts:
        raise ValueError("specdecpp: counts= holds no text; give a dataset, or a .jsonl with a prompt or text a line")
    by_count = sorted(set(range(num_rows)) - always, key=lambda token: (-counts[token], token))
    kept = sorted(always | set(by_count[: size - len(always)]))
    known = set(kept)
    tokens = [token for text in held_out for token in (text.emitted or text.given)]
    return Kept(kept, num_texts, len(tokens), sum(token in known for token in tokens))


def always_kept(folder: Path, tokenizer: Any, num_rows: int) -> set[int]:
    """Special and added tokens, and those that end a text by the model's configurations."""
    found = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for part in (config, config.get("text_config") or {}):
            ids = part.get("eos_token_id")
            found.update(ids if isinstance(ids, list) else [ids])
    return {token for token in found if isinstance(token, int) and 0 <= token < num_rows}


def from_dataset(folder: Path) -> Iterator[Text]:
    """The answers of a dataset, else what its rounds accepted; see :func:`read_texts` for what it raises."""
    from vllm_specdecpp.data.shard_file import ACCEPTED
    from vllm_specdecpp.data.shards import open_dataset
    from vllm_specdecpp.training.collect.responses import read_responses

    dataset = open_dataset(folder)
    if dataset.manifest.source != "server":
        for row in read_responses(folder):
            yield Text(str(row["id"]), row["prompt_token_ids"], row["token_ids"])
        return
    for shard in dataset.shards():  # a server's traffic: what the target accepted is its own
        starts = shard.round_starts.tolist()
        for start, end, prompt in zip(starts[:-1], starts[1:], shard.prompt_index.tolist(), strict=True):
            taken = shard.token_ids[start:end][shard.outcome[start:end] == ACCEPTED]
            yield Text(shard.prompts[prompt]["id"], [], taken.tolist())


def _checked(texts: Iterator[Text], source: Path, tokenizer: Any, num_rows: int) -> Iterator[Text]:
    """Refuses ids of another tokenizer: they are beyond the rows, or decode to text that is encoded otherwise."""
    num, same = 0, 0
    for text in texts:
        ids = [*text.given, *text.emitted]
        if max(ids, default=0) >= num_rows:
            raise ValueError(
                f"specdecpp: counts={str(source)!r} holds the token id {max(ids)}, and the draft has {num_rows} rows; "
                "give counts of the draft's own tokenizer"
            )
        if num < _COMPARED:
            again = tokenizer.encode(tokenizer.decode(ids, skip_special_tokens=False), add_special_tokens=False)
            num += len(ids)
            same += (Counter(ids) & Counter(again)).total()
            if num >= _COMPARED:
                _check_same(num, same, source)
        yield text
    if num < _COMPARED:
        _check_same(num, same, source)


def _check_same(num: int, same: int, source: Path) -> None:
    if same < _SAME_TOKENS * num:
        raise ValueError(
            f"specdecpp: counts={str(source)!r} was made with another tokenizer than the draft's; "
            "give a dataset of this pair, or a .jsonl of texts"
        )


def _from_file(path: Path, tokenizer: Any) -> Iterator[Text]:
    for number, row in json_rows(path, "counts"):
        given, emitted = ("".join(str(row[key]) for key in keys if row.get(key)) for keys in (COLUMNS, _ANSWERS))
        if not given and not emitted:
            names = " or ".join((*COLUMNS, *_ANSWERS))
            raise ValueError(f"specdecpp: counts {path}, line {number}, has no {names}; mend the line")
        ids = [tokenizer.encode(text, add_special_tokens=False) if text else [] for text in (given, emitted)]
        yield Text(str(row.get("id", number)), *ids)
