# SPDX-License-Identifier: Apache-2.0
"""The dataset folder that an engine fills by itself (option ``record_dir``): unit after unit, up to a bound on disk."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import torch

from vllm_specdecpp.data.shards import Manifest, Shard, create_dataset, write_shard
from vllm_specdecpp.provenance import command_line, git_sha, model_label, model_revision, now, versions

LOCK = ".recording"


def server_manifest(vllm_config: Any) -> Manifest:
    """What a folder says about itself that records the traffic of an engine with this ``vllm.config.VllmConfig``."""
    speculative = vllm_config.speculative_config
    target, draft = vllm_config.model_config.model, speculative.draft_model_config.model
    return Manifest(
        target=model_label(target),
        draft=model_label(draft),
        target_revision=model_revision(target),
        draft_revision=model_revision(draft),
        hidden_size=speculative.draft_model_config.get_hidden_size(),
        source="server",
        # Each request brings its own sampling parameters; the temperature stands beside every round.
        sampling={"draft_sample_method": speculative.draft_sample_method},
        num_candidates=speculative.num_speculative_tokens,
        prompts_digest="",
        num_prompts=0,
        unit_size=0,
        versions=versions(),
        git=git_sha(),
        command=command_line(),
        created=now(),
    )


class RecordFolder:
    """Shards of one recording engine; others are kept out by a lock as long as this one lives.

    Args:
        folder: new, or recorded from an engine of the same models and options; recording then goes on there.
        manifest: of this engine.

    Raises:
        ValueError: the folder holds another dataset, cannot be written, or is being recorded into.
    """

    def __init__(self, folder: str | Path, manifest: Manifest) -> None:
        self.path = Path(folder).expanduser()
        try:
            self._dataset = create_dataset(self.path, manifest, False)
            self._lock = (self.path / LOCK).open("w")
        except OSError as error:
            raise ValueError(
                f"specdecpp: record_dir={str(folder)!r} cannot be written ({error.strerror}); name another folder"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise ValueError(
                f"specdecpp: record_dir={str(folder)!r} is being recorded into by another engine; name another folder"
            ) from None

    @property
    def num_bytes(self) -> int:
        """Size of the shards on disk."""
        return sum(self._dataset.shard_path(unit).stat().st_size for unit in self._dataset.units())

    def write(self, shard: Shard, max_bytes: float) -> bool:
        """Write the next unit, unless the folder would then exceed ``max_bytes``; whether it was written.

        Raises:
            ValueError: the disk is full.
        """
        if self.num_bytes + _num_bytes(shard) > max_bytes:
            return False
        unit = max(self._dataset.units(), default=-1) + 1
        write_shard(self._dataset.shard_path(unit), shard, self._dataset.manifest)
        return True

    def close(self) -> None:
        """Let other engines record here."""
        self._lock.close()


def _num_bytes(shard: Shard) -> int:
    """Upper estimate of the shard's file: its tensors, and room for the header and the prompts in it."""
    tensors = sum(value.nbytes for value in vars(shard).values() if isinstance(value, torch.Tensor))
    return tensors + 4096 + sum(len(json.dumps(prompt)) + 16 for prompt in shard.prompts)
