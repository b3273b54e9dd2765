# SPDX-License-Identifier: Apache-2.0
"""A dataset: a folder with a manifest, one shard of labels a unit of prompts, and the responses of each unit.

``manifest.json``, ``shards/00000.safetensors``, ``responses/00000.jsonl``. Files are named by the unit: one that is
done again replaces its files, so that an interrupted collection goes on where it stopped and nothing is there twice.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vllm_specdecpp.data.manifest import MANIFEST_FILE, Manifest, read_manifest, write_manifest
from vllm_specdecpp.data.shard_file import ACCEPTED, NOT_OBSERVED, Shard, read_shard

logger = logging.getLogger("vllm.specdecpp")


@dataclass
class Summary:
    """What a dataset holds."""

    steps: int = 0
    """Candidates drafted and verified."""

    observed: int = 0
    """Of those with a known outcome."""

    accepted: int = 0
    rounds: int = 0
    prompts: int = 0
    """Different ones."""

    bytes: int = 0
    """Of the shards on disk."""


class Dataset:
    """A dataset folder; made by :func:`create_dataset` or :func:`open_dataset`."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    def shard_path(self, unit: int) -> Path:
        """Where the shard of a unit is, or goes."""
        return self.folder / "shards" / f"{unit:05d}.safetensors"

    def units(self) -> list[int]:
        """Units that have a shard, intact or not, in order. Files with other names are none of ours."""
        stems = [path.stem for path in (self.folder / "shards").glob("*.safetensors")]
        return sorted(int(stem) for stem in stems if stem.isdecimal() and stem == f"{int(stem):05d}")

    def shard(self, unit: int) -> Shard:
        """The shard of a unit; see :func:`read_shard` for what it raises."""
        return read_shard(self.shard_path(unit), self.manifest)

    def done_units(self) -> set[int]:
        """Units that have an intact shard. A damaged one is reported and counts as not done."""
        done = set()
        for unit in self.units():
            try:
                self.shard(unit)
            except ValueError as error:
                logger.warning("%s (counts as not done)", error)
            else:
                done.add(unit)
        return done

    def shards(self) -> Iterator[Shard]:
        """The shards in the order of their units, one at a time.

        Raises:
            ValueError: one line naming the file: a shard is damaged or foreign.
        """
        for unit in self.units():
            yield self.shard(unit)

    def summary(self) -> Summary:
        """Count what the shards hold.

        Raises:
            ValueError: as :meth:`shards`.
        """
        found = Summary()
        prompts: set[tuple[str, str]] = set()
        for unit, shard in zip(self.units(), self.shards(), strict=True):
            found.steps += shard.num_steps
            found.observed += int((shard.outcome != NOT_OBSERVED).sum())
            found.accepted += int((shard.outcome == ACCEPTED).sum())
            found.rounds += shard.num_rounds
            found.bytes += self.shard_path(unit).stat().st_size
            prompts |= {(prompt["set"], prompt["id"]) for prompt in shard.prompts}
        found.prompts = len(prompts)
        return found


def open_dataset(folder: Path | str) -> Dataset:
    """An existing dataset.

    Raises:
        ValueError: one line: the folder is none, or its manifest is damaged.
    """
    path = Path(folder).expanduser()
    return Dataset(path, read_manifest(path))


def create_dataset(folder: Path | str, manifest: Manifest, force: bool) -> Dataset:
    """A new dataset, or the one in ``folder`` if it has the same settings: then collection goes on.

    Args:
        folder: made if missing.
        manifest: of the collection that is about to run.
        force: start anew; only the dataset's own files are deleted.

    Raises:
        ValueError: one line: the folder holds a dataset with other settings (the first is named), or other files, or
            cannot be written. Then nothing has changed.
    """
    path = Path(folder).expanduser()
    try:
        return _create(path, manifest, force)
    except OSError as error:
        raise ValueError(
            f"specdecpp: {path} cannot be used ({error.strerror or error}); check its permissions, or name another"
        ) from error


def _create(path: Path, manifest: Manifest, force: bool) -> Dataset:
    if path.exists() and not path.is_dir():
        raise ValueError(f"specdecpp: {path} is a file; name a folder")
    own, other = _files(path)
    if (path / MANIFEST_FILE).exists() and not force:
        dataset = open_dataset(path)
        if difference := dataset.manifest.first_difference(manifest):
            name, before, now = difference
            raise ValueError(
                f"specdecpp: {path} was collected with {name}={before!r}, not {now!r}; name another folder, "
                "or add --force to delete what it holds"
            )
        return dataset
    if other:
        raise ValueError(f"specdecpp: {path} holds other files ({other[0].name}); name a new or empty folder")
    if own and not force:
        raise ValueError(
            f"specdecpp: {path} holds data without {MANIFEST_FILE}; restore it, or add --force to delete the data"
        )
    # The manifest goes first: a folder without one is never taken for a dataset.
    for file in sorted(own, key=lambda file: file.name != MANIFEST_FILE):
        file.unlink(missing_ok=True)
    write_manifest(path, manifest)
    return Dataset(path, manifest)


def _files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Our files below ``folder``, and other things in it; hidden ones are left alone."""
    own: list[Path] = []
    other: list[Path] = []
    for name, suffix in (("shards", ".safetensors"), ("responses", ".jsonl")):
        for file in (folder / name).glob("*"):
            ours = file.is_file() and file.suffix in (suffix, ".part")
            (own if ours else other).append(file)
    for file in folder.glob("*"):
        if file.name == MANIFEST_FILE or (file.name.startswith(MANIFEST_FILE) and file.suffix == ".part"):
            own.append(file)
        elif not file.name.startswith(".") and not (file.is_dir() and file.name in ("shards", "responses")):
            other.append(file)
    return own, other
