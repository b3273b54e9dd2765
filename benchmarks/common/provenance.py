# SPDX-License-Identifier: Apache-2.0
"""Where a number comes from: command, versions, hardware, git state. No machine paths end up in a result file."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_specdecpp import provenance


def command_line(argv: list[str], module: str) -> str:
    """The command as one would type it in the repository root, with ``~`` and relative paths for absolute ones."""
    return " ".join(["python -m", module, *(provenance.quoted_portably(argument) for argument in argv)])


def model_label(name: str) -> str:
    """A model's name for a result row: the hub id, or the folder's last name for a local path."""
    return Path(name).name if Path(name).is_dir() else name


def versions() -> dict[str, str]:
    """Versions of what was measured, and the machine that it ran on."""
    return provenance.versions() | {"hardware": provenance.hardware()}


def git_state() -> str:
    """Commit's SHA, with ``-dirty`` when a file other than a result differs from it; ``unknown`` outside a checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    sha = git("rev-parse", "HEAD") or "unknown"
    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return sha + ("-dirty" if changed else "")


def origin(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The last lines of a page: command, versions, commits."""
    last = runs[-1]
    versions = ", ".join(f"{name} {value}" for name, value in last["versions"].items() if name != "hardware")
    commits = ", ".join(dict.fromkeys(run["git"] for run in runs))
    return ["", f"`{last['command']}`", "", f"{versions}; git {commits}", ""]
