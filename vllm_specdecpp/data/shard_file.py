# SPDX-License-Identifier: Apache-2.0
"""One shard of a dataset: the recorded steps of a unit of prompts, in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vllm_specdecpp.data.manifest import FORMAT, Manifest
from vllm_specdecpp.files import write_whole

ACCEPTED, REJECTED, NOT_OBSERVED = 1, 0, -1
"""Values of ``Shard.outcome``."""


@dataclass
class RoundRecord:
    """One round of one request, as the engine hands it over. The first ``num_verified`` steps count."""

    request_id: str
    hidden_states: Tensor
    """[num_candidates, hidden_size] of the pass that yields each candidate."""

    token_ids: Sequence[int]
    """The candidates."""

    top1_prob: Tensor
    entropy: Tensor
    margin: Tensor
    soft_label: Tensor
    """[num_candidates] float32 each; a NaN ``soft_label`` is unknown."""

    num_accepted: int
    num_verified: int
    """Candidates that the target has read, at most num_candidates."""

    emitted: int
    """Output tokens of the request before this round."""

    temperature: float


@dataclass
class Shard:
    """The steps of many rounds, flat: one step is one drafted candidate that was verified.

    The state that has read candidate k of a round is ``hidden_states`` of candidate k + 1, if the round has one.
    """

    hidden_states: Tensor
    """[num_steps, hidden_size] in the draft's dtype, of the pass that yields the candidate."""

    token_ids: Tensor
    """[num_steps] int32, the candidates."""

    top1_prob: Tensor
    """[num_steps] float32."""

    entropy: Tensor
    """[num_steps] float32, in nats."""

    margin: Tensor
    """[num_steps] float32, of the two largest logits."""

    outcome: Tensor
    """[num_steps] int8: 1 accepted, 0 the round's first rejection, -1 after it: not observed."""

    soft_label: Tensor
    """[num_steps] float32, min(1, p/q); NaN where unknown."""

    round_starts: Tensor
    """[num_rounds + 1] int64, first step of each round, and the number of steps."""

    num_accepted: Tensor
    """[num_rounds] int32."""

    prompt_index: Tensor
    """[num_rounds] int32, into ``prompts``."""

    emitted: Tensor
    """[num_rounds] int32, output tokens of the request before the round."""

    temperature: Tensor
    """[num_rounds] float32."""

    prompts: list[dict[str, str]]
    """``{"id", "set"}`` of each request."""

    @property
    def num_steps(self) -> int:
        return self.outcome.shape[0]

    @property
    def num_rounds(self) -> int:
        return self.num_accepted.shape[0]

    @property
    def round_of_step(self) -> Tensor:
        """[num_steps] int64."""
        return torch.repeat_interleave(torch.arange(self.num_rounds), self.round_starts.diff())

    @property
    def position(self) -> Tensor:
        """[num_steps] int64, 1-based index of each candidate in its round."""
        return torch.arange(self.num_steps) - self.round_starts[self.round_of_step] + 1


_DTYPES = {
    "token_ids": torch.int32, "top1_prob": torch.float32, "entropy": torch.float32, "margin": torch.float32,
    "outcome": torch.int8, "soft_label": torch.float32, "round_starts": torch.int64,
    "num_accepted": torch.int32, "prompt_index": torch.int32, "emitted": torch.int32, "temperature": torch.float32,
}  # fmt: skip
_TENSORS = tuple(field.name for field in fields(Shard) if field.name != "prompts")


def outcomes(num_accepted: Tensor, round_starts: Tensor) -> Tensor:
    """[num_steps] int8 ``outcome`` of rounds with [num_rounds] ``num_accepted`` and [num_rounds + 1] starts."""
    lengths = round_starts.diff()
    offset = torch.arange(int(lengths.sum())) - torch.repeat_interleave(round_starts[:-1], lengths)
    accepted = torch.repeat_interleave(num_accepted.long(), lengths)
    outcome = torch.full_like(offset, NOT_OBSERVED)
    outcome[offset == accepted] = REJECTED
    outcome[offset < accepted] = ACCEPTED
    return outcome.to(torch.int8)


def shard_from_rounds(rounds: Sequence[RoundRecord], prompts_by_request: Mapping[str, Mapping[str, str]]) -> Shard:
    """Pack recorded rounds; candidates beyond ``num_verified`` are left out, and so is a round with none.

    Args:
        rounds: of one draft model, each request's in their order.
        prompts_by_request: request id to ``{"id", "set"}``; rounds of other requests are left out.

    Raises:
        ValueError: one line: no rounds are left.
    """
    rounds = [r for r in rounds if r.num_verified > 0 and r.request_id in prompts_by_request]
    if not rounds:
        raise ValueError("specdecpp: no verified round was recorded; write an empty_shard for this unit")
    requests = list(dict.fromkeys(r.request_id for r in rounds))
    index = {request_id: i for i, request_id in enumerate(requests)}

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(r, name)[: r.num_verified].cpu() for r in rounds])

    round_starts = torch.tensor([0, *(r.num_verified for r in rounds)]).cumsum(0)  # [num_rounds + 1]
    num_accepted = torch.tensor([r.num_accepted for r in rounds], dtype=torch.int32)
    scalars = {name: joined(name).float() for name in ("top1_prob", "entropy", "margin", "soft_label")}
    return Shard(
        hidden_states=joined("hidden_states"),
        token_ids=torch.tensor([t for r in rounds for t in r.token_ids[: r.num_verified]], dtype=torch.int32),
        outcome=outcomes(num_accepted, round_starts),
        round_starts=round_starts,
        num_accepted=num_accepted,
        prompt_index=torch.tensor([index[r.request_id] for r in rounds], dtype=torch.int32),
        emitted=torch.tensor([r.emitted for r in rounds], dtype=torch.int32),
        temperature=torch.tensor([r.temperature for r in rounds], dtype=torch.float32),
        prompts=[{key: prompts_by_request[request][key] for key in ("id", "set")} for request in requests],
        **scalars,
    )


def empty_shard(manifest: Manifest, prompts: Sequence[Mapping[str, str]] = ()) -> Shard:
    """A shard without rounds: of a unit whose responses were too short to draft anything, so that it counts as done."""
    columns = {name: torch.zeros(1 if name == "round_starts" else 0, dtype=dtype) for name, dtype in _DTYPES.items()}
    return Shard(
        hidden_states=torch.zeros(0, manifest.hidden_size),
        prompts=[{key: prompt[key] for key in ("id", "set")} for prompt in prompts],
        **columns,
    )


def write_shard(path: Path, shard: Shard, manifest: Manifest) -> None:
    """Write a shard, in place of one that is there.

    Raises:
        ValueError: one line: the disk is full, or the file cannot be written; then nothing is left behind and a shard
            that was there is untouched.
    """
    tensors: dict[str, Tensor] = {name: getattr(shard, name) for name in _TENSORS}
    # The library refuses tensors of one storage.
    tensors = {name: (t if _owns_memory(t) else t.clone()).detach().cpu().contiguous() for name, t in tensors.items()}
    metadata = {
        "format": str(FORMAT), "fingerprint": manifest.fingerprint, "target": manifest.target, "draft": manifest.draft,
        "prompts": json.dumps(shard.prompts),
    }  # fmt: skip
    # In memory first: the library's own writer would hide the system's error.
    write_whole(path, save(tensors, metadata))


def read_shard(path: Path, manifest: Manifest) -> Shard:
    """Read a shard. The tensors are views of the file until they are copied.

    Raises:
        ValueError: one line naming the file: missing, truncated, or of other models.
    """
    mend = "remove it and run the same collect command again, which makes this unit anew"
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise ValueError(f"specdecpp: shard {path} cannot be read ({error.strerror or error}); {mend}") from None
    except SafetensorError as error:
        raise ValueError(f"specdecpp: shard {path} is truncated or damaged ({error}); {mend}") from None
    if metadata.get("fingerprint") != manifest.fingerprint:
        raise ValueError(f"specdecpp: shard {path} {_foreign(metadata, manifest)}")
    try:
        return Shard(prompts=json.loads(metadata["prompts"]), **{name: tensors[name] for name in _TENSORS})
    except KeyError as error:
        raise ValueError(f"specdecpp: shard {path} is damaged (it has no {error}); {mend}") from None


def _foreign(metadata: Mapping[str, str], manifest: Manifest) -> str:
    """Why a shard with another fingerprint does not belong to the dataset."""
    if "target" not in metadata or "draft" not in metadata:
        return "was not written by this package; move it out of the dataset"
    pair, ours = f"{metadata['target']} / {metadata['draft']}", f"{manifest.target} / {manifest.draft}"
    if pair == ours:
        return f"is not of its dataset's hidden size ({manifest.hidden_size}); move it out"
    return f"is of the pair {pair}, but its dataset of {ours}; move it out of the dataset"


def _owns_memory(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == tensor.nbytes
