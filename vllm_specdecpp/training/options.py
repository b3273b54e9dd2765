# SPDX-License-Identifier: Apache-2.0
"""What the options of every command have in common. Imports pydantic only: the command line reads it for ``--help``."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class CommandOptions(BaseModel):
    """Base of the commands' options: one field an option, its docstring the option's ``--help``.

    A field whose ``json_schema_extra`` is :data:`POSITIONAL` is given without its name on the command line.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


POSITIONAL: dict[str, Any] = {"positional": True}
"""``data: list[Path] = Field(json_schema_extra=POSITIONAL)`` makes ``data`` a positional argument."""
