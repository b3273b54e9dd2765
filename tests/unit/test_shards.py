# SPDX-License-Identifier: Apache-2.0
"""Shards: what they hold, written whole or not at all, and refused when damaged or foreign."""

from __future__ import annotations

import errno
import os
import random
import secrets
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.dataset_files import (
    PROMPTS,
    files_in,
    make_dataset,
    make_manifest,
    make_round,
    make_rounds,
    make_shard,
    refused,
)
from vllm_specdecpp.data.shard_file import empty_shard, read_shard, shard_from_rounds, write_shard
from vllm_specdecpp.data.shards import create_dataset, open_dataset
from vllm_specdecpp.files import write_whole


def test_rounds_against_a_plain_loop():
    shard = make_shard()
    steps, rounds = [], []
    for record in make_rounds():
        if record.num_verified == 0 or record.request_id not in PROMPTS:
            continue
        rounds.append((record.num_accepted, "ba".index(record.request_id), record.emitted))
        for k in range(record.num_verified):
            outcome = 1 if k < record.num_accepted else 0 if k == record.num_accepted else -1
            row = (
                record.token_ids[k],
                float(record.entropy[k]),
                float(record.soft_label[k]),
                outcome,
                k + 1,
                len(rounds) - 1,
            )
            steps.append((row, record.hidden_states[k]))
    columns = (shard.token_ids, shard.entropy, shard.soft_label, shard.outcome, shard.position, shard.round_of_step)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == [row for row, _ in steps]
    assert torch.equal(shard.hidden_states, torch.stack([state for _, state in steps]))
    found = zip(shard.num_accepted.tolist(), shard.prompt_index.tolist(), shard.emitted.tolist(), strict=True)
    assert list(found) == rounds
    assert shard.prompts == [{"id": "b-1", "set": "gsm8k"}, {"id": "a-1", "set": "alpaca"}]


def test_two_requests_of_one_prompt_stay_apart():
    rnd = random.Random(0)
    rounds = [make_round(rnd, "a", 1, 1, 0), make_round(rnd, "b", 1, 1, 0)]
    shard = shard_from_rounds(rounds, {"a": PROMPTS["a"], "b": PROMPTS["a"]})
    assert shard.prompt_index.tolist() == [0, 1] and shard.prompts[0] == shard.prompts[1]


def test_written_and_read(tmp_path):
    dataset = make_dataset(tmp_path / "d")
    shard, found = make_shard(), dataset.shard(0)
    for name, value in vars(shard).items():
        if isinstance(value, torch.Tensor):
            assert getattr(found, name).dtype == value.dtype and torch.equal(getattr(found, name), value), name
    assert found.prompts == shard.prompts
    assert open_dataset(str(tmp_path / "d")).manifest == make_manifest()


def test_a_column_that_heads_once_read_is_passed_over(tmp_path):
    dataset = make_dataset(tmp_path / "d")
    path = dataset.shard_path(0)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path) | {"drawn_logprob": torch.zeros(make_shard().num_steps)}, path, metadata)
    assert torch.equal(dataset.shard(0).margin, make_shard().margin)


def test_tensors_that_share_memory_are_written(tmp_path):
    shard = make_shard()
    block = torch.rand(2, shard.num_steps)
    write_shard(tmp_path / "s", replace(shard, entropy=block[0], margin=block[1]), make_manifest())
    assert torch.equal(read_shard(tmp_path / "s", make_manifest()).margin, block[1])


def test_a_unit_without_a_round_counts_as_done(tmp_path):
    dataset = create_dataset(tmp_path / "d", make_manifest(), False)
    write_shard(dataset.shard_path(3), empty_shard(dataset.manifest, [PROMPTS["a"]]), dataset.manifest)
    assert dataset.done_units() == {3}
    assert dataset.shard(3).num_rounds == dataset.shard(3).num_steps == len(dataset.shard(3).position) == 0
    assert dataset.summary().prompts == 1


def test_nothing_recorded_is_no_shard():
    with refused("no verified round"):
        shard_from_rounds([make_round(random.Random(0), "unknown", 3, 3, 1)], PROMPTS)


def test_summary(tmp_path):
    dataset = make_dataset(tmp_path / "d", units=2)
    found = dataset.summary()
    # A unit: rounds of 3, 4, 1 and 5 steps with 1, 4, 0 and 2 accepted; observed are these and the first rejections.
    assert (found.steps, found.observed, found.accepted, found.rounds) == (2 * 13, 2 * 10, 2 * 7, 2 * 4)
    assert found.prompts == 2, "the same prompts in both units"
    assert found.bytes == sum(len(data) for name, data in files_in(tmp_path / "d").items() if name.startswith("shards"))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _truncate_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


DAMAGES = {
    "empty": (lambda path: path.write_bytes(b""), "truncated or damaged"),
    "missing": (lambda path: path.unlink(), "cannot be read"),
    "truncated": (_truncate, "truncated or damaged"),
    "header": (_truncate_header, "truncated or damaged"),
    "garbage": (lambda path: path.write_bytes(b"\xff" * 999), "truncated or damaged"),
    "not ours": (lambda path: save_file({"x": torch.ones(1)}, path), "was not written by this package"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_refused_by_name_and_counts_as_not_done(tmp_path, damage, caplog):
    dataset = make_dataset(tmp_path / "d", units=3)
    path = dataset.shard_path(1)
    spoil, message = DAMAGES[damage]
    spoil(path)
    with refused(message) as failure:
        dataset.shard(1)
    assert str(path) in str(failure.value)
    assert dataset.done_units() == {0, 2}
    if damage != "missing":
        assert [record for record in caplog.records if str(path) in record.getMessage()], "it is reported"
        with refused(message):
            list(dataset.shards())
    write_shard(path, make_shard(), dataset.manifest)
    assert dataset.done_units() == {0, 1, 2}, "made anew"


def test_every_cut_is_noticed(tmp_path):
    dataset = make_dataset(tmp_path / "d")
    path = dataset.shard_path(0)
    content = path.read_bytes()
    for cut in [*range(0, len(content), 61), len(content) - 1]:
        path.write_bytes(content[:cut])
        assert dataset.done_units() == set(), cut


def test_a_shard_of_another_pair_names_both(tmp_path):
    theirs = make_dataset(tmp_path / "theirs", draft="org/other")
    ours = make_dataset(tmp_path / "ours")
    os.replace(theirs.shard_path(0), ours.shard_path(0))
    with refused("org/target / org/other, but its dataset of org/target / org/draft"):
        ours.shard(0)
    assert ours.done_units() == set()


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, call, code):
    dataset = make_dataset(tmp_path / "d", units=2)
    before = files_in(tmp_path / "d")

    def full(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        for unit in (1, 2):
            with refused("disk is full; free space and run the same command again"):
                write_shard(dataset.shard_path(unit), make_shard(), dataset.manifest)
        with refused("disk is full"):
            create_dataset(tmp_path / "new", make_manifest(), False)
    assert files_in(tmp_path / "d") == before, "no .part, and the earlier shards as they were"
    assert dataset.done_units() == {0, 1}
    write_shard(dataset.shard_path(2), make_shard(), dataset.manifest)
    assert dataset.done_units() == {0, 1, 2}
    assert create_dataset(tmp_path / "new", make_manifest(), False).done_units() == set()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
def test_a_device_that_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(secrets, "token_hex", lambda _: "mine")
    path = tmp_path / "file"
    path.write_bytes(b"old")
    (tmp_path / "file.mine.part").symlink_to("/dev/full")
    with refused("disk is full"):
        write_whole(path, b"new" * 99)
    assert files_in(tmp_path) == {"file": b"old"}


def test_another_error_is_not_called_a_full_disk(tmp_path, monkeypatch):
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with refused("cannot be written \\(Input/output error\\)"):
        write_whole(tmp_path / "file", b"new")


def test_an_interrupt_leaves_no_part(tmp_path, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "file", b"new")
    assert files_in(tmp_path) == {}


def test_what_a_killed_process_left_is_cleared_by_the_next(tmp_path):
    """Another one that may be at it is left alone."""
    (tmp_path / "file.one.part").write_bytes(b"half")
    (tmp_path / "file.two.part").write_bytes(b"half")
    os.utime(tmp_path / "file.one.part", (0, 0))
    write_whole(tmp_path / "file", b"new")
    assert files_in(tmp_path) == {"file": b"new", "file.two.part": b"half"}


def test_shards_come_by_unit_and_files_of_other_names_are_none(tmp_path):
    dataset = make_dataset(tmp_path / "d")
    rnd = random.Random(0)
    for unit in (12, 2, 100_000):
        shard = shard_from_rounds([make_round(rnd, "a", 1, 1, 1, emitted=unit)], PROMPTS)
        write_shard(dataset.shard_path(unit), shard, dataset.manifest)
    (tmp_path / "d" / "shards" / "copy.safetensors").write_bytes(b"")
    (tmp_path / "d" / "shards" / "7.safetensors").write_bytes(b"")
    emitted = [int(shard.emitted[0]) for shard in dataset.shards()]
    assert dataset.units() == [0, 2, 12, 100_000] and emitted[1:] == [2, 12, 100_000]
