# SPDX-License-Identifier: Apache-2.0
"""Shards of the paper's labels: the target's responses to a unit's prompts, labelled by ``paper_labels``."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vllm_specdecpp.data.shards import Shard, empty_shard, open_dataset, write_shard
from vllm_specdecpp.training.collect.paper_labels import CausalModel, Positions, label, uniforms
from vllm_specdecpp.training.collect.responses import (
    generate_responses,
    pick_responses,
    read_responses,
    responses_of,
    responses_path,
)
from vllm_specdecpp.training.collect.units import UnitSummary, write_responses

if TYPE_CHECKING:
    from vllm_specdecpp.data.prompts import Prompt
    from vllm_specdecpp.data.shards import Manifest
    from vllm_specdecpp.training.collect.options import CollectOptions


class PaperCollector:
    """Labels the target's responses to the prompts of a unit.

    The responses of a unit lie beside its shard (``responses/NNNNN.jsonl``), come from the dataset that the option
    ``responses`` names, or are generated with vLLM: then for all units that lack them, before the models are loaded.

    Args:
        options: of the command ``collect``.
        manifest: of the dataset in ``options.out``, which must be there.

    Raises:
        ValueError: one line: ``responses`` is no dataset of this target.
    """

    def __init__(self, options: CollectOptions, manifest: Manifest) -> None:
        self._options = options
        self._manifest = manifest
        self._dataset = open_dataset(options.out)
        self._given = None if options.responses is None else responses_of(options.responses, manifest.target)
        self._models: tuple[CausalModel, CausalModel] | None = None

    def collect(self, unit_index: int, prompts: list[Prompt]) -> UnitSummary:
        """Write one unit, replacing it if it is there.

        Raises:
            ValueError: one line: no responses to be had, models that do not fit together, or a full disk.
        """
        from tqdm import tqdm

        start = time.perf_counter()
        rows = self._responses(unit_index, prompts)
        target, draft = self._loaded()
        bounds = [model.max_length for model in (target, draft) if model.max_length is not None]
        usable = [
            row for row in rows
            if row["token_ids"] and len(row["prompt_token_ids"]) + len(row["token_ids"]) <= min(bounds, default=1 << 60)
        ]  # fmt: skip
        position = {prompt.id: i for i, prompt in enumerate(prompts)}
        found = []
        batches = range(0, len(usable), self._options.batch)
        for first in tqdm(batches, leave=False, position=1, file=sys.stderr, desc=f"shard {unit_index}"):
            batch = usable[first : first + self._options.batch]
            randoms = [
                uniforms(self._options.seed, unit_index, position[row["id"]], len(row["token_ids"])) for row in batch
            ]
            texts = ([row["prompt_token_ids"] for row in batch], [row["token_ids"] for row in batch])
            found += label(target, draft, *texts, randoms, self._options.mixing)
        labelled = [{"id": row["id"], "set": row["set"]} for row in usable]
        shard = _as_shard(found, labelled) if found else empty_shard(self._manifest)
        write_shard(self._dataset.shard_path(unit_index), shard, self._manifest)
        return UnitSummary(
            unit=unit_index,
            prompts=len(usable),
            skipped=len(prompts) - len(usable),
            tokens=sum(len(row["token_ids"]) for row in usable),
            rounds=shard.num_rounds,
            steps=shard.num_steps,
            observed=shard.num_steps,
            accepted=int(shard.num_accepted.sum()),
            seconds=time.perf_counter() - start,
        )

    def close(self) -> None:
        """Free the models."""
        self._models = None

    def _loaded(self) -> tuple[CausalModel, CausalModel]:
        if self._models is None:
            target, draft = (
                CausalModel.load(name, self._options.dtype) for name in (self._options.target, self._options.draft)
            )
            if target.vocab_size != draft.vocab_size:
                raise ValueError(
                    f"specdecpp: draft={self._options.draft!r} has {draft.vocab_size} tokens, the target "
                    f"{target.vocab_size}; take a draft of the target's family and vocabulary"
                )
            self._models = target, draft
        return self._models

    def _responses(self, unit: int, prompts: list[Prompt]) -> list[dict[str, Any]]:
        """The unit's responses, which lie beside its shard afterwards."""
        path = responses_path(self._options.out, unit)
        if not path.exists():
            if self._given is None:
                self._generate_missing()
            else:
                from transformers import AutoTokenizer

                tokenizer = AutoTokenizer.from_pretrained(self._options.target)
                assert self._options.responses is not None
                rows = pick_responses(self._given, prompts, tokenizer, self._options.responses)
                write_responses(self._options.out, unit, rows)
        rows = read_responses(path)
        known = {prompt.id for prompt in prompts}
        if foreign := [row["id"] for row in rows if row["id"] not in known]:
            raise ValueError(
                f"specdecpp: responses file {path} answers {foreign[0]!r}, which is no prompt of this shard; delete it"
            )
        return rows

    def _generate_missing(self) -> None:
        """Generate for every unit that has neither shard nor responses: an engine takes long to start."""
        options = self._options
        from vllm_specdecpp.data.prompts import load_prompts

        prompts = load_prompts(options.prompts, options.limit, options.split, options.column)
        done = self._dataset.done_units()
        starts = enumerate(range(0, len(prompts), options.unit))
        missing = {
            unit: prompts[start : start + options.unit]
            for unit, start in starts
            if unit not in done and not responses_path(options.out, unit).exists()
        }
        self.close()
        generate_responses(options, missing)


def _as_shard(found: Sequence[Positions], prompts: list[dict[str, str]]) -> Shard:
    """Each position as a round of one candidate; labels are those of temperature 1."""

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(positions, name) for positions in found])

    accepted = joined("accepted")
    num = len(accepted)
    return Shard(
        hidden_states=joined("hidden_states"),
        read_hidden_states=joined("read_hidden_states"),
        token_ids=joined("token_ids").int(),
        top1_prob=joined("top1_prob"),
        entropy=joined("entropy"),
        margin=joined("margin"),
        drawn_logprob=joined("drawn_logprob"),
        soft_label=joined("soft_label"),
        outcome=accepted.to(torch.int8),
        round_starts=torch.arange(num + 1),
        num_accepted=accepted.int(),
        prompt_index=torch.cat([torch.full((len(f.accepted),), i) for i, f in enumerate(found)]).int(),
        emitted=joined("emitted").int(),
        temperature=torch.ones(num),
        prompts=prompts,
    )
