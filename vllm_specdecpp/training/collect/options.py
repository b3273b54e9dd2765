# SPDX-License-Identifier: Apache-2.0
"""The options of ``collect``, and those that ``fit`` shares with it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from vllm_specdecpp.training.options import EngineOptions

FEWEST_TOKENS = 3
"""The first token comes without a draft and the last one is the target's own: below this nothing is drafted."""


class PairOptions(EngineOptions):
    """A pair of models, the prompts that it answers, and how."""

    target: str = Field(min_length=1)
    """Target model: a folder or a hub id."""

    draft: str = Field(min_length=1)
    """Draft model: a folder or a hub id."""

    prompts: str = Field(min_length=1)
    """A .jsonl file ({"id", "set", "prompt"} a line), a .txt file (a prompt a line), or a Hugging Face dataset id."""

    temperature: float = Field(default=0.0, ge=0)
    """Of the target's answers."""

    top_k: int = Field(default=0, ge=0)
    """Of the target's answers; 0 keeps all tokens."""

    top_p: float = Field(default=1.0, gt=0, le=1)
    """Of the target's answers."""

    max_tokens: int = Field(default=128, ge=FEWEST_TOKENS)
    """Length of an answer, in tokens."""

    candidates: int = Field(default=12, ge=1, le=128)
    """Candidates drafted in every round; `tune` can try no longer ones, fewer give labels faster."""

    batch: int = Field(default=8, ge=1)
    """Prompts answered at once."""

    unit: int = Field(default=32, ge=1)
    """Prompts in a shard: what an interruption loses at most."""

    limit: int | None = Field(default=None, ge=1)
    """Take this many prompts, from the start."""

    split: str = "train"
    """Split of a Hugging Face dataset."""

    column: str | None = None
    """Column of a Hugging Face dataset that holds the prompt; by default it is found."""

    seed: int = 0
    """Of the sampling."""

    max_model_len: int | None = Field(default=None, ge=8)
    """Longest prompt and answer, in tokens; by default the model's own bound."""

    draft_sample_method: Literal["greedy", "probabilistic"] = "greedy"
    """How candidates are drawn when the temperature is above 0; as in the engine that the head is for."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of both models."""


class CollectOptions(PairOptions):
    """Record labels: which of the draft's tokens the target accepts."""

    out: Path
    """Dataset folder to write; the same command goes on there after an interruption."""

    ray: int | None = Field(default=None, ge=1)
    """Spread the units over this many workers of a Ray cluster, each with an engine of its own."""

    force: bool = False
    """Delete a dataset of other settings that is in the folder."""
