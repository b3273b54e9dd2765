# SPDX-License-Identifier: Apache-2.0
"""Recorded rounds as chains: every place of a recorded text at which some policy's round can start.

A policy that starts at offset o of a recorded round of which A candidates were accepted (o <= A) meets the recorded
steps o, o + 1, ...: the draft's state is a function of the prefix, and the prefix is the recorded text.

* Temperature 0: exact. The policy drafts what was recorded and the target answers as it did.
* Temperature > 0: a coupling, not the run that the engine would make. Given the text, whether the draft's draw at a
  place is accepted does not depend on where the round began, so the replay has the law of a run, seeds aside.

After a round with a rejection the next recorded round begins: the target's own token came between. After one in which
all were accepted the run goes on in the next recorded round, without the bonus token: the draft never proposed a
candidate in its place, so the token (with its time) is left out of the replay, alike for every policy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_specdecpp.data.dataset import open_datasets, read_shards
from vllm_specdecpp.data.prompts import PromptName
from vllm_specdecpp.data.rows import every_prompt
from vllm_specdecpp.decision.features import SCALAR_FEATURES
from vllm_specdecpp.training.fit.fitting import score

if TYPE_CHECKING:
    from vllm_specdecpp.data.shard_file import Shard
    from vllm_specdecpp.head.model import AcceptanceHead

_CHUNK = 16384
"""Hidden states that the head scores at once."""


@dataclass(frozen=True)
class Chains:
    """The chains of many prompts, flat. Each start is one emitted token of the text; a prompt's starts follow each
    other, so a round that emits n tokens leads from start i to start i + n."""

    scalars: dict[str, Tensor]
    """Name of a step feature → [num_steps] float32."""

    token_ids: Tensor
    """[num_steps] int64 recorded candidates."""

    head_logits: Tensor | None
    """[num_steps] float32, the head's uncalibrated accept minus reject logit at the step's pass; None without a head.
    With lag 1 it scores the candidate before, which the pass has read; of a chain's first step it means nothing."""

    first_step: Tensor
    """[num_starts] int64 step whose pass yields the first candidate of a round that starts here."""

    available: Tensor
    """[num_starts] int64 recorded steps from there on."""

    run: Tensor
    """[num_starts] int64 how many of them were accepted before the first rejection (or the end of the record)."""

    limited: Tensor
    """[num_starts] bool: the record ends where any draft must (an end token, the request's limit)."""

    prompt_starts: Tensor
    """[num_prompts + 1] int64 first start of each prompt."""

    prompts: list[PromptName]
    """Of each prompt."""

    recorded_length: int
    """Candidates of a recorded round that nothing cut short: no policy longer than that can be replayed."""

    @property
    def num_starts(self) -> int:
        """Starts, which is the number of tokens that every policy emits."""
        return self.first_step.shape[0]

    @property
    def prompt_of_start(self) -> Tensor:
        """[num_starts] int64."""
        sizes = self.prompt_starts.diff()
        return torch.repeat_interleave(torch.arange(len(sizes)), sizes)

    @property
    def ends_unknown(self) -> Tensor:
        """[num_starts] bool: the record ends while candidates are still being accepted, and not by a limit."""
        return (self.run == self.available) & ~self.limited

    @property
    def sets(self) -> list[str]:
        """Names of the sets, in the order of first appearance."""
        return list(dict.fromkeys(name for _, name in self.prompts))

    def in_sets(self, names: Sequence[str] | None) -> Tensor:
        """[num_prompts] bool: the prompts of some sets; of all for None."""
        return torch.tensor([names is None or name in names for _, name in self.prompts])


def load_chains(
    folders: Sequence[Path],
    head: AcceptanceHead | None = None,
    *,
    prompts_where: Callable[[PromptName], bool] = every_prompt,
) -> Chains:
    """Read the recorded rounds of some datasets; hidden states are scored shard by shard and not kept.

    Args:
        folders: datasets of one pair of models.
        head: scores every step; None leaves ``head_logits`` empty.
        prompts_where: which prompts to keep.

    Raises:
        ValueError: one line: mixed pairs, a folder given twice, or nothing recorded.
    """
    pieces: list[Chains] = []
    for dataset, shard in read_shards(open_datasets(folders)):
        chosen = [prompts_where((p["id"], p["set"])) for p in shard.prompts]
        piece = chains_of_shard(shard, chosen, head, dataset.manifest.num_candidates)
        pieces += [piece] if piece.num_starts else []
    names = ", ".join(map(str, folders))
    if not pieces:
        left = " of prompts that the head was not trained on" if prompts_where is not every_prompt else ""
        raise ValueError(f"specdecpp: no recorded rounds{left} in {names}; collect some with: vllm-specdecpp collect")
    return concatenate(pieces)


def concatenate(pieces: Sequence[Chains]) -> Chains:
    """Several chains as one."""
    steps = _offsets([piece.token_ids.shape[0] for piece in pieces])
    starts = _offsets([piece.num_starts for piece in pieces])

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(piece, name) for piece in pieces])

    heads = [piece.head_logits for piece in pieces if piece.head_logits is not None]
    return Chains(
        scalars={name: torch.cat([piece.scalars[name] for piece in pieces]) for name in pieces[0].scalars},
        token_ids=joined("token_ids"),
        head_logits=torch.cat(heads) if len(heads) == len(pieces) else None,
        first_step=torch.cat([piece.first_step + base for piece, base in zip(pieces, steps, strict=True)]),
        available=joined("available"),
        run=joined("run"),
        limited=joined("limited"),
        prompt_starts=torch.cat(
            [torch.zeros(1, dtype=torch.int64)]
            + [piece.prompt_starts[1:] + base for piece, base in zip(pieces, starts, strict=True)]
        ),
        prompts=[prompt for piece in pieces for prompt in piece.prompts],
        recorded_length=min(piece.recorded_length for piece in pieces),
    )


def _offsets(sizes: list[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


@dataclass
class _Segment:
    """Recorded rounds linked over their bonus tokens; only the last can hold a rejection."""

    steps: list[int]  # indices into the shard's steps
    num_accepted: int
    limited: bool


def _segments(shard: Shard, rounds: Sequence[int], recorded_length: int) -> Iterator[_Segment]:
    """The segments of one prompt's rounds, in order."""
    starts, accepted, emitted = (x.tolist() for x in (shard.round_starts, shard.num_accepted, shard.emitted))
    segment: _Segment | None = None
    for i, r in enumerate(rounds):
        steps = range(starts[r], starts[r + 1])
        segment = segment or _Segment([], 0, False)
        segment.steps += steps
        segment.num_accepted += accepted[r]
        segment.limited = len(steps) < recorded_length  # any draft would have ended there
        follows = i + 1 < len(rounds) and emitted[rounds[i + 1]] == emitted[r] + accepted[r] + 1
        if accepted[r] < len(steps) or not follows:
            yield segment
            segment = None


def chains_of_shard(shard: Shard, chosen: Sequence[bool], head: AcceptanceHead | None, recorded_length: int) -> Chains:
    """The chains of one shard's chosen prompts.

    Args:
        chosen: of each prompt of the shard, whether to keep it.
        recorded_length: candidates of every recorded round that no limit cut short.
    """
    by_prompt: dict[int, list[int]] = {}
    emitted = shard.emitted.tolist()
    for r, prompt in enumerate(shard.prompt_index.tolist()):
        if chosen[prompt]:
            by_prompt.setdefault(prompt, []).append(r)
    steps: list[int] = []
    columns: list[tuple[int, int, int, bool]] = []  # first step, available, run, limited
    prompt_starts = [0]
    for rounds in by_prompt.values():
        rounds.sort(key=lambda r: emitted[r])
        for segment in _segments(shard, rounds, recorded_length):
            size = len(segment.steps)
            for offset in range(segment.num_accepted + 1):
                columns.append((len(steps) + offset, size - offset, segment.num_accepted - offset, segment.limited))
            steps += segment.steps
        prompt_starts.append(len(columns))
    order = torch.tensor(steps, dtype=torch.int64)  # [num_steps]
    table = torch.tensor(columns, dtype=torch.int64).reshape(-1, 4)  # [num_starts, 4]
    scalars = {name: getattr(shard, name)[order].float() for name in SCALAR_FEATURES}
    return Chains(
        scalars=scalars,
        token_ids=shard.token_ids[order].long(),
        head_logits=None if head is None else _score(head, shard.hidden_states, order, scalars),
        first_step=table[:, 0],
        available=table[:, 1],
        run=table[:, 2],
        limited=table[:, 3].bool(),
        prompt_starts=torch.tensor(prompt_starts),
        prompts=[(shard.prompts[p]["id"], shard.prompts[p]["set"]) for p in by_prompt],
        recorded_length=recorded_length,
    )


@torch.no_grad()
def _score(head: AcceptanceHead, hidden_states: Tensor, order: Tensor, scalars: dict[str, Tensor]) -> Tensor:
    """The head's logit at every step of ``order``: [num_steps] float32."""
    logits = []
    for rows in torch.arange(len(order)).split(_CHUNK):
        columns = {name: column[rows] for name, column in scalars.items()}
        logits.append(score(head, hidden_states[order[rows]], columns))
    return torch.cat(logits)
