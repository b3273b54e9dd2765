# SPDX-License-Identifier: Apache-2.0
"""A page as a headless Chromium shows it, where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def page_of(url: str, profile: Path, *arguments: str) -> str:
    """The document after nine seconds of its own clock, as HTML; no script of it failed, nothing was refused.

    Args:
        profile: folder of the browser's own.
        arguments: more of Chromium's.
    """
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
        "--enable-logging=stderr", "--virtual-time-budget=9000", "--dump-dom", *arguments, url,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "Content Security Policy" not in done.stderr and "Uncaught" not in done.stderr, done.stderr
    return done.stdout


def plots_of(page: str) -> dict[str, str]:
    """Title of each plot -> what stands beside it."""
    return {title: beside.strip() for title, beside in re.findall(r'aria-label="([^":]+): ([^"]*)"', page)}
