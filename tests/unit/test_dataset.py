# SPDX-License-Identifier: Apache-2.0
"""Label rows against a plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dataset_files import make_manifest, refused
from vllm_specdecpp.data.dataset import LabelRows, load_rows, rows_of
from vllm_specdecpp.data.shard_file import Shard, empty_shard, write_shard
from vllm_specdecpp.data.shards import create_dataset

HIDDEN_SIZE = 3
SCALARS = ("top1_prob", "entropy", "margin")
SHAPES: list[tuple[int, int]] = [(3, 1), (4, 4), (1, 0), (1, 1), (6, 2), (2, 2)]
"""Length of a round, and how many of it are accepted."""


def _shard(first_token: int, shapes: list[tuple[int, int]], prompts: list[tuple[str, str]]) -> Shard:
    """Rounds of ``shapes``, prompts in turn; every step's numbers tell which step it is."""
    lengths = torch.tensor([length for length, _ in shapes])
    num = int(lengths.sum())
    step = torch.arange(first_token, first_token + num)
    outcome = [1 if k < a else 0 if k == a else -1 for length, a in shapes for k in range(length)]
    return Shard(
        hidden_states=step[:, None].float() + torch.tensor([0.0, 0.25, 0.5]),
        token_ids=step.int(),
        **{name: step.float() + 0.1 * (i + 1) for i, name in enumerate(SCALARS)},
        outcome=torch.tensor(outcome, dtype=torch.int8),
        soft_label=torch.where(step % 2 == 0, torch.nan, 0.5),
        round_starts=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        num_accepted=torch.tensor([a for _, a in shapes], dtype=torch.int32),
        prompt_index=torch.arange(len(shapes), dtype=torch.int32) % len(prompts),
        emitted=torch.zeros(len(shapes), dtype=torch.int32),
        temperature=torch.zeros(len(shapes)),
        prompts=[{"id": prompt_id, "set": name} for prompt_id, name in prompts],
    )


PROMPTS = [("p0", "alpaca"), ("p1", "gsm8k"), ("p2", "alpaca")]


def _plain(shard: Shard, lag: int) -> list[tuple[int, int, float, tuple[str, str]]]:
    """(step that the row is of, position, accepted, prompt) by a loop over rounds."""
    rows = []
    starts = shard.round_starts.tolist()
    for r, accepted in enumerate(shard.num_accepted.tolist()):
        prompt = shard.prompts[int(shard.prompt_index[r])]
        for step in range(starts[r], starts[r + 1]):
            k = step - starts[r]
            observed = k <= accepted
            was_read = lag == 0 or step + 1 < starts[r + 1]
            if observed and was_read:
                rows.append((step, k + 1, float(k < accepted), (prompt["id"], prompt["set"])))
    return rows


def _check(rows: LabelRows, shard: Shard, lag: int) -> None:
    want = _plain(shard, lag)
    index = torch.tensor([step for step, *_ in want], dtype=torch.int64)
    assert torch.equal(rows.hidden, shard.hidden_states[index + lag])
    assert set(rows.scalars) == set(SCALARS)
    for name, column in rows.scalars.items():
        assert torch.equal(column, getattr(shard, name)[index]), name
    torch.testing.assert_close(rows.soft, shard.soft_label[index], equal_nan=True)
    found = (rows.position.tolist(), rows.accepted.tolist(), [rows.prompts[i] for i in rows.prompt.tolist()])
    assert list(zip(*found, strict=True)) == [row[1:] for row in want]
    dtypes = (rows.position.dtype, rows.prompt.dtype, rows.accepted.dtype, rows.soft.dtype)
    assert dtypes == (torch.int64, torch.int64, torch.float32, torch.float32)


@pytest.mark.parametrize("lag", [0, 1])
def test_rows_of_rounds(lag):
    shard = _shard(0, SHAPES, PROMPTS)
    _check(rows_of(shard, lag), shard, lag)
    # Observed 2, 4, 1, 1, 3 and 2; of the second, third, fourth and last round, no pass has read the last one.
    assert len(rows_of(shard, lag)) == (13 if lag == 0 else 9)


def test_rows_are_no_views_of_the_file(tmp_path):
    dataset = _write(tmp_path / "d", [_shard(0, SHAPES, PROMPTS)])
    rows = load_rows([dataset], 0)
    rows.hidden.zero_()
    assert float(load_rows([dataset], 0).hidden.abs().sum()) > 0


@pytest.mark.parametrize("lag", [0, 1])
def test_rows_of_nothing(lag):
    rows = rows_of(empty_shard(make_manifest(hidden_size=HIDDEN_SIZE)), lag)
    assert len(rows) == 0 and rows.hidden.shape == (0, HIDDEN_SIZE)


def _write(folder: Path, shards: list[Shard], **changes: Any) -> Path:
    dataset = create_dataset(folder, make_manifest(**{"hidden_size": HIDDEN_SIZE, **changes}), False)
    for unit, shard in enumerate(shards):
        write_shard(dataset.shard_path(unit), shard, dataset.manifest)
    return folder


def _steps(rows: LabelRows) -> list[int]:
    return [round(float(x) - 0.1) for x in rows.scalars["top1_prob"]]


def test_several_datasets_number_prompts_alike(tmp_path):
    shards = [_shard(0, SHAPES, PROMPTS[:2]), _shard(100, SHAPES, PROMPTS[1:]), _shard(200, SHAPES, [("p0", "other")])]
    folders = [_write(tmp_path / "a", shards[:2]), _write(tmp_path / "b", shards[2:], draft="copy/draft")]
    rows = load_rows(folders, 0)
    assert rows.prompts == [("p0", "alpaca"), ("p1", "gsm8k"), ("p2", "alpaca"), ("p0", "other")]
    assert rows.sets == ["alpaca", "gsm8k", "other"]
    want = [
        (base + step, prompt)
        for base, shard in zip((0, 100, 200), shards, strict=True)
        for step, _, _, prompt in _plain(shard, 0)
    ]
    assert _steps(rows) == [step for step, _ in want]
    assert [rows.prompts[i] for i in rows.prompt.tolist()] == [prompt for _, prompt in want]
    for name in (*rows.sets, "none"):
        assert rows.in_set(name).tolist() == [name == theirs for _, (_, theirs) in want]


def test_prompts_where(tmp_path):
    folder = _write(tmp_path / "a", [_shard(0, SHAPES, PROMPTS), _shard(100, SHAPES, PROMPTS)])
    kept = load_rows([folder], 0, prompts_where=lambda prompt: prompt[0] != "p0")
    dropped = load_rows([folder], 0, prompts_where=lambda prompt: prompt[0] == "p0")
    assert {kept.prompts[i][0] for i in kept.prompt.tolist()} == {"p1", "p2"}
    assert sorted(_steps(kept) + _steps(dropped)) == sorted(_steps(load_rows([folder], 0)))
    with refused("no label of the chosen prompts"):
        load_rows([folder], 0, prompts_where=lambda _: False)


def test_select_and_concat():
    rows = rows_of(_shard(0, SHAPES, PROMPTS), 1)
    odd = torch.arange(len(rows)) % 2 == 1
    assert _steps(rows.select(odd)) == _steps(rows)[1::2]
    order = torch.tensor([4, 0, 0])
    assert _steps(rows.select(order)) == [_steps(rows)[i] for i in (4, 0, 0)]
    assert rows.select(order).prompt.tolist() == rows.prompt[order].tolist()
    both = LabelRows.concat([rows.select(odd), rows.select(~odd)])
    assert sorted(_steps(both)) == _steps(rows) and both.prompts == list(rows.prompts)


@pytest.mark.parametrize(
    "changes",
    [{"draft": "org/other"}, {"target": "org/other"}],
    ids=["draft", "target"],
)
def test_mixed_pairs_are_refused_and_named(tmp_path, changes):
    folders = [_write(tmp_path / name, [_shard(0, SHAPES, PROMPTS)], **c) for name, c in (("a", {}), ("b", changes))]
    with refused("b is of the pair .*other.*, but .*a of org/target / org/draft"):
        load_rows(folders, 0)


def test_another_hidden_size_is_another_pair(tmp_path):
    folder = create_dataset(tmp_path / "b", make_manifest(hidden_size=8), False).folder
    with refused("hidden size 8"):
        load_rows([_write(tmp_path / "a", [_shard(0, SHAPES, PROMPTS)]), folder], 0)


def test_other_versions_of_the_draft_are_reported(tmp_path, caplog):
    shards = [_shard(0, SHAPES, PROMPTS)]
    folders = [_write(tmp_path / name, shards, draft_revision=name) for name in ("a", "b")]
    load_rows(folders, 0)
    assert "revisions a and b" in caplog.text


def test_the_same_dataset_twice_is_refused(tmp_path):
    folder = _write(tmp_path / "a", [_shard(0, SHAPES, PROMPTS)])
    with refused("given twice"):
        load_rows([folder, folder / "shards" / ".."], 0)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(3, 0), (1, 0)], "no accepted candidate among 2 labels"),
        ([(3, 3), (1, 1)], "no rejected candidate among 4 labels"),
        ([], "no label"),
    ],
    ids=["no accepted", "no rejected", "none"],
)
def test_nothing_to_learn_from(tmp_path, shapes, message):
    shard = _shard(0, shapes, PROMPTS) if shapes else empty_shard(make_manifest(hidden_size=HIDDEN_SIZE))
    folder = _write(tmp_path / "a", [shard])
    with refused(message) as failure:
        load_rows([folder], 0)
    assert str(folder) in str(failure.value)


def test_a_damaged_shard_is_not_skipped(tmp_path):
    folder = _write(tmp_path / "a", [_shard(100 * i, SHAPES, PROMPTS) for i in range(3)])
    path = folder / "shards" / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with refused("00001.safetensors is truncated"):
        load_rows([folder], 0)
