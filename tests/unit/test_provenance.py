# SPDX-License-Identifier: Apache-2.0
"""Names, versions and commands that are written beside data and heads."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_specdecpp import provenance


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"hidden_size": 4}')
    (folder / "model.safetensors").write_bytes(bytes(200_000))
    return folder


def _cached(root: Path, commit: str) -> Path:
    folder = root / "models--org--some-model" / "snapshots" / commit
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    refs = root / "models--org--some-model" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    return folder


def test_label_of_a_hub_id_a_folder_and_the_hubs_cache(model, tmp_path, monkeypatch):
    assert provenance.model_label("Org/Model-1B") == "Org/Model-1B"
    assert provenance.model_label(model) == provenance.model_label(f"{model}/") == "runs/tiny"
    monkeypatch.chdir(model.parent)
    assert provenance.model_label("tiny") == provenance.model_label("./tiny") == "runs/tiny"
    assert provenance.model_label(_cached(tmp_path, "a" * 40)) == "org/some-model"


def test_revision_of_a_folder_tells_weights_and_configs_apart(model, tmp_path):
    first = provenance.model_revision(model)
    assert first is not None and re.fullmatch(r"sha256:[0-9a-f]{32}", first)
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    assert provenance.model_revision(copy) == first, "the place does not count"
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-8, 2)
        file.write(b"finetune")
    assert provenance.model_revision(copy) != first
    shutil.copytree(model, copy, dirs_exist_ok=True)
    (copy / "config.json").write_text('{"hidden_size": 8}')
    assert provenance.model_revision(copy) != first
    shutil.copytree(model, copy, dirs_exist_ok=True)
    (copy / "model.safetensors.index.json").write_text("{}")
    assert provenance.model_revision(copy) != first


def test_revision_of_hub_models(tmp_path, monkeypatch):
    folder = _cached(tmp_path, "b" * 40)
    assert provenance.model_revision(folder) == "b" * 40
    ask = "from vllm_specdecpp.provenance import model_revision as r; "
    program = ask + "print(r('org/some-model'), r('org/other'))"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["b" * 40, "None"]
    assert provenance.model_revision("./no/such folder") is None


def test_versions_name_what_is_installed():
    found = provenance.versions()
    assert found["python"] == sys.version.split()[0]
    assert "torch" in found and all(found.values())


def test_git_sha_counts_a_checkout_of_this_package_only(tmp_path, monkeypatch):
    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(tmp_path), *args], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    package = tmp_path / "vllm_specdecpp"
    (package / "training").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(provenance, "__file__", str(package / "training" / "provenance.py"))
    assert provenance.git_sha() is None
    git("init", "-q")
    (tmp_path / "other").write_text("")
    commit = ("-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "one")
    git("add", "other")
    git(*commit)
    assert provenance.git_sha() is None, "somebody else's checkout"
    git("add", ".")
    git(*commit)
    assert provenance.git_sha() == git("rev-parse", "HEAD")
    (package / "__init__.py").write_text("x = 1")
    assert provenance.git_sha() == git("rev-parse", "HEAD") + "-dirty"


def test_command_line_holds_no_machine_path(tmp_path, monkeypatch):
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(home))
    arguments = ["train", f"{work}/data a", f"--out={home}/it's", "--lr", "1e-3", str(home / "x")]
    line = provenance.command_line(["/opt/venv/bin/vllm-specdecpp", *arguments])
    assert line == """vllm-specdecpp train 'data a' --out=~/'it'"'"'s' --lr 1e-3 ~/x"""
    assert str(tmp_path) not in line
    line = provenance.command_line(["/x/vllm_specdecpp/cli.py", "tune", str(tmp_path / "z")])
    assert line == "vllm-specdecpp tune ../z"


def test_now_is_utc():
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", provenance.now())
