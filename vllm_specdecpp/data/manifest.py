# SPDX-License-Identifier: Apache-2.0
"""What a dataset folder says about itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from vllm_specdecpp.files import read_json, write_whole

FORMAT: Literal[1] = 1
MANIFEST_FILE = "manifest.json"
_NO_SETTINGS = ("versions", "git", "command", "created")
"""May differ between the runs that fill one folder."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Of which models and how the labels of a dataset were collected."""

    __pydantic_config__ = {"extra": "forbid", "strict": True}

    format: Literal[1] = FORMAT
    """Version of the folder's layout."""

    kind: Literal["rounds"] = "rounds"
    """What the engine drafted and verified, round by round."""

    target: str
    """Label of the target model (``provenance.model_label``)."""

    draft: str
    """Label of the draft model."""

    target_revision: str | None = None
    """Hub commit, or digest of a local folder; None if unknown."""

    draft_revision: str | None = None
    """As ``target_revision``."""

    hidden_size: int
    """Of the draft model."""

    source: Literal["on-policy"] = "on-policy"
    """What made the labels: the engine's own rounds."""

    sampling: Mapping[str, Any]
    """Temperature, top_k, top_p, max_tokens, draft_sample_method and whatever else shapes the labels."""

    num_candidates: int
    """Candidates of a round at most."""

    prompts_digest: str
    """``prompts.digest`` of all prompts."""

    num_prompts: int
    """All of them."""

    unit_size: int
    """Prompts a shard."""

    versions: Mapping[str, str]
    """Package to version."""

    git: str | None = None
    """Commit that this package ran from."""

    command: str = ""
    """That made the folder."""

    created: str = ""
    """Time in UTC, ISO 8601."""

    @property
    def pair(self) -> str:
        """Draft and target by their last names."""
        return " → ".join(label.rpartition("/")[2] for label in (self.draft, self.target))

    @property
    def fingerprint(self) -> str:
        """The same for all shards that may lie in one folder: of the pair, the hidden size and the kind."""
        text = json.dumps([self.target, self.draft, self.hidden_size, self.kind])
        return hashlib.sha256(text.encode()).hexdigest()

    def first_difference(self, other: Manifest) -> tuple[str, Any, Any] | None:
        """(setting, ours, other's) of the first setting that differs; None if the same command would go on."""
        ours, theirs = _plain(self), _plain(other)
        for name, value in ours.items():
            if name in _NO_SETTINGS or value == theirs[name]:
                continue
            if isinstance(value, dict):
                for key in sorted({*value, *theirs[name]}):
                    if value.get(key) != theirs[name].get(key):
                        return f"{name}.{key}", value.get(key), theirs[name].get(key)
            return name, value, theirs[name]
        return None


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a dataset folder.

    Raises:
        ValueError: one line: there is none, or it cannot be read, or it is of another format.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise ValueError(
            f"specdecpp: {folder} is no dataset: it has no {MANIFEST_FILE}; name a folder that collect has made"
        )
    return read_json(path, _ADAPTER, "use the version that wrote it, or collect into another folder")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a dataset folder; see :func:`write_whole` for what it raises."""
    write_whole(folder / MANIFEST_FILE, (json.dumps(_plain(manifest), indent=2) + "\n").encode())


def _plain(manifest: Manifest) -> dict[str, Any]:
    """As JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(asdict(manifest)))


_ADAPTER: TypeAdapter[Manifest] = TypeAdapter(Manifest)
