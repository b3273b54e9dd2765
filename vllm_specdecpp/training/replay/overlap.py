# SPDX-License-Identifier: Apache-2.0
"""Whether prompts that a rule is reported on are among those that it was tuned on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from vllm_specdecpp.training.collect.responses import read_responses
from vllm_specdecpp.training.fit.held_out import PromptName, prompts_of

if TYPE_CHECKING:
    from vllm_specdecpp.data.shards import Dataset
    from vllm_specdecpp.training.replay.chains import Chains


def refuse_overlap(data: Sequence[Dataset], evaluate: Sequence[Dataset], judged: Chains) -> None:
    """Tuning on what one reports on flatters the rule, and so does a head that was trained on it.

    All prompts of the data count, also those that are left out since the head was trained on them.

    Raises:
        ValueError: a prompt of the evaluation is among the data, by its id and set or, where the datasets hold the
            texts, word for word under another id.
    """
    common = [(prompt, prompt) for prompt in sorted(prompts_of(data) & set(judged.prompts))]
    if not common:
        texts = {text: prompt for prompt, text in prompt_texts(data)}
        here = set(judged.prompts)
        theirs = [(prompt, texts.get(text)) for prompt, text in prompt_texts(evaluate) if prompt in here]
        common = sorted((prompt, twin) for prompt, twin in theirs if twin is not None)
    if common:
        (name, in_set), twin = common[0]
        alias = "" if twin == (name, in_set) else f", there {twin[0]!r} of {twin[1]!r}"
        raise ValueError(
            f"specdecpp: --evaluate shares {len(common)} prompts with --data (e.g. {name!r} of {in_set!r}{alias}); "
            "report on prompts that nothing was tuned on"
        )


def prompt_texts(datasets: Sequence[Dataset]) -> Iterator[tuple[PromptName, str]]:
    """Each prompt whose text the datasets' responses hold, and a digest of its token ids.

    Raises:
        ValueError: one line: a responses file is damaged.
    """
    for dataset in datasets:
        for path in sorted((dataset.folder / "responses").glob("*.jsonl")):
            for row in read_responses(path):
                text = json.dumps(row["prompt_token_ids"]).encode()
                yield (row["id"], row["set"]), hashlib.sha256(text).hexdigest()
