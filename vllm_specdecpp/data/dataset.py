# SPDX-License-Identifier: Apache-2.0
"""Label rows out of dataset folders: in memory, or streamed from datasets of any size."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from vllm_specdecpp.data.rows import LabelRows, every_prompt, rows_of
from vllm_specdecpp.data.shards import Dataset, open_dataset
from vllm_specdecpp.head.files import same_model

__all__ = ["LabelRows", "load_rows", "open_datasets", "rows_of", "stream_batches"]

logger = logging.getLogger("vllm.specdecpp")

_PROGRESS_AFTER_S = 2.0


def load_rows(
    folders: Sequence[Path],
    lag: int,
    *,
    prompts_where: Callable[[str], bool] = every_prompt,
    max_rows: int | None = None,
) -> LabelRows:
    """The rows of some datasets, in memory.

    Args:
        folders: datasets of one pair of models.
        lag: as in :func:`rows_of`.
        prompts_where: which prompt ids to keep.
        max_rows: at most so many, of shards in an order that is shuffled but always the same; None takes all, in the
            order of the folders and units.

    Raises:
        ValueError: one line: no dataset, mixed pairs, a damaged shard, no rows, or none accepted or none rejected.
    """
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"specdecpp: max_rows={max_rows} must be 1 or more, or left out")
    files = _shard_files(open_datasets(folders))
    if max_rows is not None:
        files = _shuffled(files, torch.Generator().manual_seed(0))
    parts: list[LabelRows] = []
    num_rows = 0
    for dataset, unit in tqdm(files, desc="read shards", unit="shard", delay=_PROGRESS_AFTER_S, leave=False):
        parts.append(rows_of(dataset.shard(unit), lag, prompts_where))
        num_rows += len(parts[-1])
        if max_rows is not None and num_rows >= max_rows:
            break
    _check_labels(num_rows, sum(float(part.accepted.sum()) for part in parts), folders)
    rows = LabelRows.concat(parts)
    return rows if max_rows is None or num_rows <= max_rows else rows.select(torch.arange(max_rows))


def stream_batches(
    folders: Sequence[Path],
    lag: int,
    batch_size: int,
    seed: int,
    epoch: int,
    prompts_where: Callable[[str], bool] = every_prompt,
    buffer_rows: int = 65_536,
) -> Iterator[LabelRows]:
    """The rows of datasets of any size, once each, in shuffled batches: the same for the same arguments.

    The shards come in an order of (seed, epoch); their rows are shuffled in a buffer, of which half goes out each time.

    Args:
        folders: datasets of one pair of models.
        lag: as in :func:`rows_of`.
        batch_size: rows a batch; the last one may be smaller.
        seed: of the order.
        epoch: another one gives another order.
        prompts_where: which prompt ids to keep.
        buffer_rows: held in memory, besides one shard.

    Raises:
        ValueError: as :func:`load_rows`, at the call; of a damaged shard when the stream gets there.
    """
    for name, value in (("batch_size", batch_size), ("buffer_rows", buffer_rows)):
        if value < 1:
            raise ValueError(f"specdecpp: {name}={value} must be 1 or more")
    generator = torch.Generator().manual_seed((seed << 16) + epoch)
    files = _shuffled(_shard_files(open_datasets(folders)), generator)
    _check_both_labels(files, lag, prompts_where, folders)
    return _stream(files, lag, batch_size, generator, prompts_where, buffer_rows)


def _stream(
    files: Sequence[tuple[Dataset, int]], lag: int, batch_size: int, generator: torch.Generator,
    prompts_where: Callable[[str], bool], buffer_rows: int,
) -> Iterator[LabelRows]:  # fmt: skip
    # One growing list of prompts, so that joining costs nothing for those of shards long gone.
    numbers: dict[tuple[str, str], int] = {}
    prompts: list[tuple[str, str]] = []
    pool: LabelRows | None = None
    for dataset, unit in files:
        rows = rows_of(dataset.shard(unit), lag, prompts_where).renumbered(numbers, prompts)
        pool = rows if pool is None else LabelRows.concat([pool, rows])
        num_out = (len(pool) - buffer_rows // 2) // batch_size * batch_size if len(pool) >= buffer_rows else 0
        if num_out > 0:
            order = torch.randperm(len(pool), generator=generator)
            for index in order[:num_out].split(batch_size):
                yield pool.select(index)
            pool = pool.select(order[num_out:])
    if pool is not None and len(pool):
        for index in torch.randperm(len(pool), generator=generator).split(batch_size):
            yield pool.select(index)


def open_datasets(folders: Sequence[Path]) -> list[Dataset]:
    """Open datasets that are to be used together.

    Raises:
        ValueError: one line: no folder or one given twice, no dataset, or datasets of different pairs.
    """
    if not folders:
        raise ValueError("specdecpp: no dataset is named; give one or more folders that collect has made")
    datasets = [open_dataset(folder) for folder in folders]
    if len({dataset.folder.resolve() for dataset in datasets}) < len(datasets):
        raise ValueError(f"specdecpp: a dataset is given twice in {', '.join(map(str, folders))}; name each once")
    first = datasets[0]
    for dataset in datasets[1:]:
        a, b = first.manifest, dataset.manifest
        same = same_model(a.target, b.target) and same_model(a.draft, b.draft) and a.hidden_size == b.hidden_size
        if not same:
            raise ValueError(
                f"specdecpp: {dataset.folder} is of the pair {b.target} / {b.draft} (hidden size {b.hidden_size}), but "
                f"{first.folder} of {a.target} / {a.draft} ({a.hidden_size}); give datasets of one pair"
            )
        if None not in (a.draft_revision, b.draft_revision) and a.draft_revision != b.draft_revision:
            logger.warning(
                "specdecpp: %s and %s may be of different versions of the draft (revisions %s and %s)",
                first.folder, dataset.folder, a.draft_revision, b.draft_revision,
            )  # fmt: skip
    return datasets


def _shard_files(datasets: Sequence[Dataset]) -> list[tuple[Dataset, int]]:
    return [(dataset, unit) for dataset in datasets for unit in dataset.units()]


def _shuffled(files: list[tuple[Dataset, int]], generator: torch.Generator) -> list[tuple[Dataset, int]]:
    return [files[i] for i in torch.randperm(len(files), generator=generator).tolist()]


def _check_both_labels(
    files: Sequence[tuple[Dataset, int]], lag: int, prompts_where: Callable[[str], bool], folders: Sequence[Path]
) -> None:
    """Read shards until both an accepted and a rejected candidate are found: the first one, as a rule."""
    num_rows, num_accepted = 0, 0.0
    for dataset, unit in files:
        rows = rows_of(dataset.shard(unit), lag, prompts_where)
        num_rows += len(rows)
        num_accepted += float(rows.accepted.sum())
        if 0 < num_accepted < num_rows:
            return
    _check_labels(num_rows, num_accepted, folders)


def _check_labels(num_rows: int, num_accepted: float, folders: Sequence[Path]) -> None:
    names = ", ".join(map(str, folders))
    if num_rows == 0:
        raise ValueError(f"specdecpp: {names}: no label of the chosen prompts; collect more prompts, or choose others")
    for missing, count in (("accepted", num_accepted), ("rejected", num_rows - num_accepted)):
        if count == 0:
            raise ValueError(
                f"specdecpp: {names}: no {missing} candidate among {num_rows} labels: there is nothing to tell apart; "
                "collect more prompts, or check that draft and target belong together"
            )
