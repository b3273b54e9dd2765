# SPDX-License-Identifier: Apache-2.0
"""Files that are written whole or not at all, folders of results, and JSON files that are checked as they are read."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

_GIVEN_UP = 3600
"""Seconds after which nobody will finish a part of a file."""
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
Content = TypeVar("Content")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that, whatever happens, it holds either all of ``content`` or what it held before.

    Raises:
        ValueError: one line: the disk is full, or the file cannot be written; nothing is left behind.
    """
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # somebody else may write the same file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise ValueError(
                f"specdecpp: {path} cannot be written: the disk is full; free space and run the same command again"
            ) from error
        raise ValueError(
            f"specdecpp: {path} cannot be written ({error.strerror or error}); check the folder and its permissions"
        ) from error
    for other in path.parent.glob(f"{path.name}.*.part"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - other.stat(follow_symlinks=False).st_mtime > _GIVEN_UP:
                other.unlink()


def check_free(folder: Path, names: Sequence[str], force: bool) -> None:
    """Refuse, before any work, a folder that results cannot be written into in the end.

    Args:
        names: of the results.
        force: whether those that are there may be replaced.

    Raises:
        ValueError: one line: it is a file, or holds such results.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"specdecpp: out={folder} is a file; name a folder")
    present = [name for name in names if (folder / name).exists()]
    if present and not force:
        raise ValueError(
            f"specdecpp: out={folder} holds {', '.join(present)} already; add --force to replace them, or name another "
            "folder"
        )


def read_json(path: Path, kind: TypeAdapter[Content], mend: str) -> Content:
    """What a JSON file holds.

    Raises:
        ValueError: one line that ends in ``mend``: it cannot be read, is no JSON, or is not of this kind.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ValueError(f"specdecpp: {path} cannot be read ({error.strerror}); {mend}") from None
    return parse_json(text, kind, path, mend)


def parse_json(text: bytes, kind: TypeAdapter[Content], path: Path, mend: str) -> Content:
    """As :func:`read_json`, of the text that ``path`` holds or is to hold."""
    try:
        return kind.validate_json(text)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        reason = str(fault["msg"]).removeprefix("Value error, ").removeprefix("specdecpp: ")
        if fault["loc"]:
            value = "" if fault["type"] == "missing" else f"={fault['input']!r:.60}"
            reason = f"{'.'.join(map(str, fault['loc']))}{value}: {reason}"
        raise ValueError(f"specdecpp: {path} is damaged ({reason}); {mend}") from None
