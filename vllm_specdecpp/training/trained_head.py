# SPDX-License-Identifier: Apache-2.0
"""Loading a head to work on, checked against the data."""

from __future__ import annotations

from pathlib import Path

from vllm_specdecpp.data.manifest import Manifest
from vllm_specdecpp.head.files import CONFIG_FILE, same_model
from vllm_specdecpp.head.model import AcceptanceHead


def load_head(folder: Path, manifest: Manifest) -> AcceptanceHead:
    """The head in a folder.

    Args:
        folder: of a trained head.
        manifest: of the data that it is used with.

    Raises:
        ValueError: one line: no head there, or one of another pair than the data.
    """
    if not folder.is_dir():
        raise ValueError(f"specdecpp: head={str(folder)!r} is no folder; give the folder of a trained head")
    head = AcceptanceHead.from_pretrained(
        folder, expected_hidden_size=manifest.hidden_size, expected_draft=manifest.draft
    )
    target = head.metadata.get("target")
    if isinstance(target, str) and target and not same_model(target, manifest.target):
        raise ValueError(
            f"specdecpp: head={str(folder)!r} was trained for the target {target!r}, but the data is of "
            f'{manifest.target!r}; use a head of this pair, or correct "target" in its {CONFIG_FILE}'
        )
    return head
