# SPDX-License-Identifier: Apache-2.0
"""A head's own list of prompts: what it was trained on is told even when the datasets are gone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.dataset_files import make_manifest, make_round
from vllm_specdecpp.data.prompts import split_by_id
from vllm_specdecpp.data.shards import Dataset, create_dataset, shard_from_rounds, write_shard
from vllm_specdecpp.training.fit.calibrate import CalibrateOptions, run
from vllm_specdecpp.training.fit.held_out import (
    TrainingData,
    name_digest,
    prompt_lists,
    prompts_of,
    refuse_seen,
    training_data,
)
from vllm_specdecpp.training.fit.train import TrainOptions
from vllm_specdecpp.training.fit.train import run as train

VALIDATION = 0.4


def make_dataset(folder: Path, ids: list[str], digest: str, in_set: str = "a") -> Dataset:
    """Rounds of one candidate that is accepted every other time, twelve a prompt."""
    import random

    dataset = create_dataset(folder, make_manifest(prompts_digest=digest, num_prompts=len(ids)), False)
    rnd = random.Random(digest)
    rounds = [make_round(rnd, each, 1, 1, at % 2) for each in ids for at in range(12)]
    write_shard(
        dataset.shard_path(0), shard_from_rounds(rounds, {i: {"id": i, "set": in_set} for i in ids}), dataset.manifest
    )
    return dataset


IDS = [f"t{i}" for i in range(20)]
HELD_OUT = [each for each in IDS if split_by_id(each, VALIDATION, 0)]
FITTED = [each for each in IDS if each not in HELD_OUT]


@pytest.fixture
def head(tmp_path: Path) -> Path:
    make_dataset(tmp_path / "train", IDS, "train")
    train(
        TrainOptions(data=[tmp_path / "train"], out=tmp_path / "head", layers=0, epochs=1, lag=0, validation=VALIDATION)
    )
    return tmp_path / "head"


def test_what_train_writes(tmp_path: Path) -> None:
    make_dataset(tmp_path / "one", IDS[:15], "one")
    make_dataset(tmp_path / "two", IDS[10:], "two")
    folders = [tmp_path / "one", tmp_path / "two"]
    train(TrainOptions(data=folders, out=tmp_path / "h", layers=0, epochs=1, validation=VALIDATION, lag=0))
    made = json.loads((tmp_path / "h" / "provenance.json").read_text())["prompts"]
    assert made == {
        "fitted": [name_digest((each, "a")) for each in sorted(FITTED)],
        "held_out": [name_digest((each, "a")) for each in sorted(HELD_OUT)],
    }
    found = training_data(tmp_path / "h")
    assert found.knows((FITTED[0], "a")) and found.knows((HELD_OUT[0], "a"))
    assert not found.knows((FITTED[0], "b")) and not found.knows(("new", "a"))


def test_single_prompts_in_another_dataset_are_told(tmp_path: Path, head: Path) -> None:
    trained = training_data(head)
    for name, ids in (("fitted", FITTED), ("held", HELD_OUT)):
        mixed = make_dataset(tmp_path / name, ["new", ids[0]], name)
        match = rf"evaluate=.*{name} shares 1 prompts with what the head was trained on \(e\.g\. '{ids[0]}' of 'a'\)"
        with pytest.raises(ValueError, match=match) as error:
            refuse_seen([mixed], [], trained, "fit")
        assert "\n" not in str(error.value)
    other = make_dataset(tmp_path / "other", [FITTED[0]], "other", in_set="b")  # the same id in another set
    refuse_seen([other], [], trained, "fit")
    refuse_seen([mixed], [], TrainingData(), "fit")


def test_calibrate_leaves_them_out_and_refuses_to_judge_by_them(tmp_path: Path, head: Path) -> None:
    def options(fit: str, *evaluate: str) -> CalibrateOptions:
        return CalibrateOptions(
            head=head, fit=[tmp_path / fit], evaluate=[tmp_path / each for each in evaluate], plots=False, bootstrap=5
        )

    make_dataset(tmp_path / "mixed", [*FITTED, *HELD_OUT, "n1", "n2"], "mixed")
    make_dataset(tmp_path / "known", FITTED, "known")
    make_dataset(tmp_path / "new", [f"n{i}" for i in range(9)], "new")
    with pytest.raises(ValueError, match="mixed shares 20 prompts with what the head was trained on"):
        run(options("new", "mixed"))
    with pytest.raises(ValueError, match="known: the head was trained on all of its prompts"):
        run(options("known"))
    assert run(options("mixed")) == 0
    config = json.loads((head / "config.json").read_text())
    assert f" {len(HELD_OUT) + 2} prompts of mixed" in config["calibration"]["fitted_on"]


def test_lists(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", IDS, "d")
    found = prompt_lists(prompts_of([dataset]), 0.0, 0)
    assert len(found["fitted"]) == len(set(found["fitted"])) == 20 and found["held_out"] == []
    assert all(len(each) == 16 for each in found["fitted"])
