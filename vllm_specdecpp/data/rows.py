# SPDX-License-Identifier: Apache-2.0
"""Labels as a head reads them: one row an observed candidate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vllm_specdecpp.data.shard_file import ACCEPTED, NOT_OBSERVED, Shard
from vllm_specdecpp.decision.features import SCALAR_FEATURES


def every_prompt(prompt_id: str) -> bool:
    """The ``prompts_where`` that leaves nothing out."""
    return True


@dataclass(frozen=True)
class LabelRows:
    """Observed candidates and what the draft knew of them."""

    hidden: Tensor
    """[n, hidden_size] in the draft's dtype: lag 1, of the pass that has read the candidate; lag 0, that yields it."""

    scalars: Mapping[str, Tensor]
    """Name to [n] float32, of the pass that yields the candidate; lag 0 leaves out what is known after the draw."""

    position: Tensor
    """[n] int64, 1-based index of the candidate in its round."""

    accepted: Tensor
    """[n] float32, 1 or 0."""

    soft: Tensor
    """[n] float32, min(1, p/q); NaN where unknown."""

    prompt: Tensor
    """[n] int64, into ``prompts``: the same prompt has the same number in all of the loaded datasets."""

    prompts: Sequence[tuple[str, str]]
    """(id, set) of each prompt; parts that share one list stay numbered by it."""

    @property
    def ids(self) -> list[str]:
        """Id of each prompt."""
        return [prompt_id for prompt_id, _ in self.prompts]

    @property
    def sets(self) -> list[str]:
        """Names of the sets, in the order of first appearance."""
        return list(dict.fromkeys(name for _, name in self.prompts))

    @property
    def set(self) -> Tensor:
        """[n] int64, into ``sets``."""
        numbers = {name: i for i, name in enumerate(self.sets)}
        return torch.tensor([numbers[name] for _, name in self.prompts], dtype=torch.int64)[self.prompt.cpu()]

    def __len__(self) -> int:
        return self.accepted.shape[0]

    def in_set(self, name: str) -> Tensor:
        """[n] bool: the rows of one set."""
        return torch.tensor([theirs == name for _, theirs in self.prompts], dtype=torch.bool)[self.prompt.cpu()]

    def select(self, mask: Tensor) -> LabelRows:
        """Some rows: by [n] bool, or by int64 indices, which may reorder and repeat."""
        return self._each(lambda column: column[mask])

    def to(self, device: torch.device | str) -> LabelRows:
        """The rows on a device."""
        return self._each(lambda column: column.to(device))

    @classmethod
    def concat(cls, parts: Sequence[LabelRows]) -> LabelRows:
        """Several as one, in their order; prompts are numbered anew where the parts' lists differ.

        Raises:
            ValueError: one line: nothing to join, or the parts have different scalars (lags).
        """
        if not parts:
            raise ValueError("specdecpp: there are no label rows to join; collect some first")
        first = parts[0]
        if any(part.scalars.keys() != first.scalars.keys() for part in parts):
            raise ValueError("specdecpp: label rows of different lags cannot be joined; load them with one lag")
        if any(part.prompts is not first.prompts for part in parts):
            numbers: dict[tuple[str, str], int] = {}
            joined: list[tuple[str, str]] = []
            parts = [part.renumbered(numbers, joined) for part in parts]
        return cls(
            hidden=torch.cat([part.hidden for part in parts]),
            scalars={name: torch.cat([part.scalars[name] for part in parts]) for name in first.scalars},
            position=torch.cat([part.position for part in parts]),
            accepted=torch.cat([part.accepted for part in parts]),
            soft=torch.cat([part.soft for part in parts]),
            prompt=torch.cat([part.prompt for part in parts]),
            prompts=parts[0].prompts,
        )

    def renumbered(self, numbers: dict[tuple[str, str], int], prompts: list[tuple[str, str]]) -> LabelRows:
        """The rows with the prompts of a list that many share: ``prompts``, to which theirs are added, and its index
        ``numbers``."""
        for prompt in self.prompts:
            if prompt not in numbers:
                numbers[prompt] = len(prompts)
                prompts.append(prompt)
        table = torch.tensor([numbers[prompt] for prompt in self.prompts], dtype=torch.int64)
        return replace(self, prompt=table.to(self.prompt.device)[self.prompt], prompts=prompts)

    def _each(self, change: Callable[[Tensor], Tensor]) -> LabelRows:
        columns = ("hidden", "position", "accepted", "soft", "prompt")
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in columns}
        return replace(self, scalars={name: change(column) for name, column in self.scalars.items()}, **changed)


def rows_of(shard: Shard, lag: int, prompts_where: Callable[[str], bool] = every_prompt) -> LabelRows:
    """The observed candidates of a shard, copied out of its file.

    Args:
        shard: of either kind.
        lag: 1 leaves out candidates that no pass has read (the last of a round of kind "rounds").
        prompts_where: which prompt ids to keep.

    Raises:
        ValueError: another lag than 0 or 1.
    """
    if lag not in (0, 1):
        raise ValueError(f"specdecpp: lag={lag} must be 1 (the pass that read the candidate) or 0 (look-ahead)")
    prompt = shard.prompt_index[shard.round_of_step].long()  # [num_steps]
    wanted = torch.tensor([prompts_where(p["id"]) for p in shard.prompts], dtype=torch.bool)
    keep = (shard.outcome != NOT_OBSERVED) & wanted[prompt]
    hidden, shift = shard.hidden_states, 0
    if lag == 1 and shard.read_hidden_states is not None:
        hidden = shard.read_hidden_states
    elif lag == 1:
        shift = 1  # the pass of the round's next candidate has read this one
        is_last = torch.zeros(shard.num_steps, dtype=torch.bool)
        is_last[shard.round_starts[1:] - 1] = True
        keep &= ~is_last
    index = keep.nonzero().squeeze(1)  # [n]
    # What is known only after the draw has no place in a look-ahead.
    names = [name for name in SCALAR_FEATURES if lag or name != "drawn_logprob"]
    return LabelRows(
        hidden=hidden[index + shift],
        scalars={name: getattr(shard, name)[index] for name in names},
        position=shard.position[index],
        accepted=(shard.outcome[index] == ACCEPTED).float(),
        soft=shard.soft_label[index],
        prompt=prompt[index],
        prompts=tuple((p["id"], p["set"]) for p in shard.prompts),
    )
