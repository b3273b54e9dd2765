# SPDX-License-Identifier: Apache-2.0
"""The options of ``shrink``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from vllm_specdecpp.training.options import POSITIONAL, EngineOptions


class ShrinkOptions(EngineOptions):
    """Write a cheaper copy of a draft model: a Hugging Face folder that vLLM loads as any other.

    The output's distribution stays the target's, whatever is done to the draft; only how many candidates are accepted
    can change. --check says whether it pays, before anyone serves it.
    """

    draft: str = Field(min_length=1, json_schema_extra=POSITIONAL)
    """Draft model: a folder or a hub id, not quantised."""

    out: Path
    """Folder to write; must not exist, unless it is this draft's and only --check is asked for."""

    scheme: Literal["int8", "fp8", "int4"] | None = None
    """Of the weights. int8: weights and activations, CPUs and GPUs. fp8: the same in fp8, GPUs from Ada and Hopper on.
    int4: weights alone. By default fp8 where a GPU has it, else int8."""

    check: bool = False
    """Play prompts with the original and the shrunk draft: agreement, pass times, predicted speed. Exit status 1 if the
    shrunk one would be slower. Needs --target and --prompts."""

    target: str | None = Field(default=None, min_length=1)
    """Target model to check with."""

    prompts: str | None = None
    """What --check plays: a dataset of collect (its prompts), a .jsonl or .txt file, or a Hugging Face dataset."""

    num_prompts: int = Field(default=8, ge=1)
    """How many of them."""

    max_tokens: int = Field(default=96, ge=8)
    """New tokens of each."""
