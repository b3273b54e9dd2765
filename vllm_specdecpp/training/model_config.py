# SPDX-License-Identifier: Apache-2.0
"""What a model's ``config.json`` says, before any weights are loaded."""

from __future__ import annotations

from typing import Any


def model_config(name: str, option: str) -> Any:
    """The ``transformers`` config of a model.

    Args:
        name: folder or hub id.
        option: that named it, for the message.

    Raises:
        ValueError: one line: it cannot be loaded, or transformers is not installed.
    """
    try:
        from transformers import AutoConfig
    except ImportError:
        raise ValueError(
            f"specdecpp: {option}={name!r} cannot be read without transformers; in the clone: pip install '.[train]'"
        ) from None
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"specdecpp: {option}={name!r} cannot be loaded ({reason}); check the name") from None
