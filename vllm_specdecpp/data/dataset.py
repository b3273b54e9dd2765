# SPDX-License-Identifier: Apache-2.0
"""Label rows out of dataset folders."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from vllm_specdecpp.data.prompts import PromptName
from vllm_specdecpp.data.rows import LabelRows, every_prompt, rows_of
from vllm_specdecpp.data.shard_file import Shard
from vllm_specdecpp.data.shards import Dataset, open_dataset
from vllm_specdecpp.head.files import same_model

logger = logging.getLogger("vllm.specdecpp")

_PROGRESS_AFTER_S = 2.0


def load_rows(
    folders: Sequence[Path], lag: int, *, prompts_where: Callable[[PromptName], bool] = every_prompt
) -> LabelRows:
    """The rows of some datasets, in memory, in the order of the folders and units.

    Args:
        folders: datasets of one pair of models.
        lag: as in :func:`rows_of`.
        prompts_where: which prompts to keep.

    Raises:
        ValueError: one line: no dataset, mixed pairs, a damaged shard, no rows, or none accepted or none rejected.
    """
    parts = [rows_of(shard, lag, prompts_where) for _, shard in read_shards(open_datasets(folders))]
    _check_labels(sum(map(len, parts)), sum(float(part.accepted.sum()) for part in parts), folders)
    return LabelRows.concat(parts)


def read_shards(datasets: Sequence[Dataset]) -> Iterator[tuple[Dataset, Shard]]:
    """Each shard with its dataset, one at a time, in the order of the datasets and units; with a progress bar.

    Raises:
        ValueError: one line naming the file: a shard is damaged or foreign.
    """
    files = [(dataset, unit) for dataset in datasets for unit in dataset.units()]
    for dataset, unit in tqdm(files, desc="read shards", unit="shard", delay=_PROGRESS_AFTER_S, leave=False):
        yield dataset, dataset.shard(unit)


def open_datasets(folders: Sequence[Path]) -> list[Dataset]:
    """Open datasets that are to be used together.

    Raises:
        ValueError: one line: a folder given twice, no dataset, or datasets of different pairs.
    """
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
