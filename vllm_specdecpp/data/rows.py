# SPDX-License-Identifier: Apache-2.0
"""Labels as a head reads them: one row an observed candidate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vllm_specdecpp.data.prompts import PromptName
from vllm_specdecpp.data.shard_file import ACCEPTED, NOT_OBSERVED, Shard
from vllm_specdecpp.decision.features import SCALAR_FEATURES


def every_prompt(prompt: PromptName) -> bool:
    """The ``prompts_where`` that leaves nothing out."""
    return True


_COLUMNS = ("hidden", "position", "accepted", "soft", "prompt")


@dataclass(frozen=True)
class LabelRows:
    """Observed candidates and what the draft knew of them."""

    hidden: Tensor
    """[n, hidden_size] in the draft's dtype: lag 1, of the pass that has read the candidate; lag 0, that yields it."""

    scalars: Mapping[str, Tensor]
    """Name to [n] float32, of the pass that yields the candidate."""

    position: Tensor
    """[n] int64, 1-based index of the candidate in its round."""

    accepted: Tensor
    """[n] float32, 1 or 0."""

    soft: Tensor
    """[n] float32, min(1, p/q); NaN where unknown."""

    prompt: Tensor
    """[n] int64, into ``prompts``: the same prompt has the same number in all of the loaded datasets."""

    prompts: Sequence[PromptName]
    """Of each prompt."""

    @property
    def sets(self) -> list[str]:
        """Names of the sets, in the order of first appearance."""
        return list(dict.fromkeys(name for _, name in self.prompts))

    def __len__(self) -> int:
        return self.accepted.shape[0]

    def in_set(self, name: str) -> Tensor:
        """[n] bool: the rows of one set."""
        return torch.tensor([theirs == name for _, theirs in self.prompts], dtype=torch.bool)[self.prompt]

    def select(self, mask: Tensor) -> LabelRows:
        """Some rows: by [n] bool, or by int64 indices, which may reorder and repeat."""
        columns: dict[str, Any] = {name: getattr(self, name)[mask] for name in _COLUMNS}
        return replace(self, scalars={name: column[mask] for name, column in self.scalars.items()}, **columns)

    @classmethod
    def concat(cls, parts: Sequence[LabelRows]) -> LabelRows:
        """Several of one lag as one, in their order; their prompts are numbered anew."""
        prompts = list(dict.fromkeys(prompt for part in parts for prompt in part.prompts))
        numbers = {prompt: i for i, prompt in enumerate(prompts)}
        tables = [torch.tensor([numbers[prompt] for prompt in part.prompts], dtype=torch.int64) for part in parts]
        columns: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in _COLUMNS}
        columns["prompt"] = torch.cat([table[part.prompt] for table, part in zip(tables, parts, strict=True)])
        scalars = {name: torch.cat([part.scalars[name] for part in parts]) for name in parts[0].scalars}
        return cls(scalars=scalars, prompts=prompts, **columns)


def rows_of(shard: Shard, lag: int, prompts_where: Callable[[PromptName], bool] = every_prompt) -> LabelRows:
    """The observed candidates of a shard, copied out of its file.

    Args:
        shard: of a dataset.
        lag: 0 or 1; 1 leaves out candidates that no pass has read: the last of each round.
        prompts_where: which prompts to keep.
    """
    prompt = shard.prompt_index[shard.round_of_step].long()  # [num_steps]
    prompts = [(p["id"], p["set"]) for p in shard.prompts]
    wanted = torch.tensor([prompts_where(each) for each in prompts], dtype=torch.bool)
    keep = (shard.outcome != NOT_OBSERVED) & wanted[prompt]
    if lag == 1:  # the pass of the round's next candidate has read this one
        is_last = torch.zeros(shard.num_steps, dtype=torch.bool)
        is_last[shard.round_starts[1:] - 1] = True
        keep &= ~is_last
    index = keep.nonzero().squeeze(1)  # [n]
    return LabelRows(
        hidden=shard.hidden_states[index + lag],
        scalars={name: getattr(shard, name)[index] for name in SCALAR_FEATURES},
        position=shard.position[index],
        accepted=(shard.outcome[index] == ACCEPTED).float(),
        soft=shard.soft_label[index],
        prompt=prompt[index],
        prompts=prompts,
    )
