# SPDX-License-Identifier: Apache-2.0
"""Dataset folders: gone on with, started anew, and refused when foreign or of other settings."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.dataset_files import (
    SETTINGS,
    files_in,
    make_dataset,
    make_manifest,
    refused,
)
from vllm_specdecpp.data.manifest import MANIFEST_FILE, read_manifest
from vllm_specdecpp.data.shards import create_dataset, open_dataset


def test_the_same_settings_go_on(tmp_path):
    make_dataset(tmp_path / "d", units=2)
    before = files_in(tmp_path / "d")
    again = make_manifest(
        versions={"torch": "2"}, git="other", command="other", created="later", sampling=SETTINGS["sampling"]
    )
    dataset = create_dataset(tmp_path / "d", again, False)
    assert dataset.done_units() == {0, 1}
    assert files_in(tmp_path / "d") == before
    assert dataset.manifest.created == "t", "the folder's own manifest"


def test_tuples_in_the_settings_go_on(tmp_path):
    create_dataset(tmp_path / "d", make_manifest(sampling={"stop": (1, 2)}), False)
    create_dataset(tmp_path / "d", make_manifest(sampling={"stop": (1, 2)}), False)


OTHER_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "draft": ({"draft": "org/other"}, "draft='org/draft', not 'org/other'"),
    "revision": ({"draft_revision": None}, "draft_revision='abc', not None"),
    "temperature": ({"sampling": {"temperature": 1.0, "top_k": 0}}, "sampling.temperature=0.0, not 1.0"),
    "new option": ({"sampling": {"temperature": 0.0, "top_k": 0, "seed": 1}}, "sampling.seed=None, not 1"),
    "prompts": ({"prompts_digest": "e"}, "prompts_digest='d', not 'e'"),
    "unit": ({"unit_size": 3, "versions": {}}, "unit_size=2, not 3"),
}


@pytest.mark.parametrize("change", OTHER_SETTINGS)
def test_other_settings_are_refused_and_named(tmp_path, change):
    make_dataset(tmp_path / "d", units=2)
    before = files_in(tmp_path / "d")
    changes, message = OTHER_SETTINGS[change]
    with refused(message):
        create_dataset(tmp_path / "d", make_manifest(**changes), False)
    assert files_in(tmp_path / "d") == before


def test_force_starts_anew_and_deletes_only_its_own(tmp_path):
    dataset = make_dataset(tmp_path / "d", units=2)
    (tmp_path / "d" / "responses").mkdir()
    (tmp_path / "d" / "responses" / "00000.jsonl").write_text("{}\n")
    (tmp_path / "d" / "shards" / "00002.safetensors.1.part").write_bytes(b"half")
    (tmp_path / "d" / ".recording").write_bytes(b"")
    dataset = create_dataset(tmp_path / "d", make_manifest(unit_size=3), True)
    assert dataset.manifest.unit_size == 3 and dataset.units() == []
    assert sorted(files_in(tmp_path / "d")) == [".recording", MANIFEST_FILE]


@pytest.mark.parametrize("name", ["notes.txt", "shards/notes.txt", "responses/00000.safetensors"])
@pytest.mark.parametrize("with_manifest", [True, False])
def test_other_files_are_never_deleted(tmp_path, name, with_manifest):
    if with_manifest:
        make_dataset(tmp_path / "d")
    path = tmp_path / "d" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    before = files_in(tmp_path / "d")
    with refused(f"holds other files \\({path.name}\\)"):
        create_dataset(tmp_path / "d", make_manifest(unit_size=3), True)
    assert files_in(tmp_path / "d") == before


def test_data_without_a_manifest_is_kept_unless_forced(tmp_path):
    dataset = make_dataset(tmp_path / "d")
    (tmp_path / "d" / MANIFEST_FILE).unlink()
    with refused(f"without {MANIFEST_FILE}"):
        create_dataset(tmp_path / "d", make_manifest(), False)
    assert dataset.shard_path(0).exists()
    assert create_dataset(tmp_path / "d", make_manifest(), True).units() == []


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "d").write_text("mine")
    for force in (False, True):
        with refused("is a file"):
            create_dataset(tmp_path / "d", make_manifest(), force)
    assert (tmp_path / "d").read_text() == "mine"


def _edited(**changes: Any) -> str:
    return json.dumps({"format": 1, **SETTINGS, **changes})


MANIFESTS = {
    "cut": (_edited()[:100], "is damaged"),
    "format": (_edited(format=2), "format=2: Input should be 1"),
    "list": ("[]", "is damaged"),
    "source": (_edited(source="tokens"), "source='tokens': Input"),
    "type": (_edited(hidden_size="5"), "hidden_size='5': Input"),
    "unknown": (_edited(surprise=1), "surprise=1: "),
    "missing": (json.dumps({"format": 1}), "target: Field required"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_damaged_manifest(tmp_path, case):
    text, message = MANIFESTS[case]
    (tmp_path / MANIFEST_FILE).write_text(text)
    with refused(message):
        open_dataset(tmp_path)
    (tmp_path / MANIFEST_FILE).write_text(_edited())
    assert read_manifest(tmp_path) == make_manifest()


def test_no_dataset(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with refused("is no dataset"):
            open_dataset(folder)
