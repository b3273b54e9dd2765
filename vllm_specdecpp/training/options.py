# SPDX-License-Identifier: Apache-2.0
"""What the options of every command have in common. Imports pydantic only: the command line reads it for ``--help``."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class CommandOptions(BaseModel):
    """Base of the commands' options: one field an option, its docstring the option's ``--help``.

    A field whose ``json_schema_extra`` is :data:`POSITIONAL` is given without its name on the command line.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class EngineOptions(CommandOptions):
    """Of the engines that a command starts."""

    kv_cache_mib: int | None = Field(default=None, ge=1)
    """Memory of the engine's KV cache; by default vLLM decides."""

    eager: bool = False
    """Do not compile the models: a faster start, slower steps."""

    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs that the models are spread over."""


POSITIONAL: dict[str, Any] = {"positional": True}
"""``data: list[Path] = Field(json_schema_extra=POSITIONAL)`` makes ``data`` a positional argument."""
