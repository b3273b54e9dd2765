# SPDX-License-Identifier: Apache-2.0
"""The YAML of a campaign: which pair, prompts, cells and methods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from benchmarks.common.methods import Method, parse_methods

AtLeastOne = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Part(_Strict):
    """Cells that the same methods answer: every set at one temperature, at some batch sizes.

    ``groups`` of prompts are answered in each of the campaign's turns; a group is ``batch`` prompts of one set.
    """

    temperature: Annotated[float, Field(ge=0)]
    batches: Annotated[list[AtLeastOne], Field(min_length=1)]
    methods: Annotated[list[str], Field(min_length=1)]
    groups: AtLeastOne = 1

    @field_validator("methods")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        return [method.label for method in parse_methods(value)]

    def parsed(self) -> list[Method]:
        """The methods, read."""
        return parse_methods(self.methods)


class Campaign(_Strict):
    """One file; a model is a hub id, a folder, or a name that ``benchmarks.models.fetch`` knows."""

    target: str
    draft: str
    other_drafts: dict[str, str] = {}
    """Further drafts by the name that a method has after its @."""
    head: str | None = None
    """Acceptance head of the draft, for the rule threshold."""
    sets: Annotated[dict[str, list[str]], Field(min_length=1)]
    """Sets of prompts by the name of their family, over which there is a total."""
    parts: Annotated[list[Part], Field(min_length=1)]
    judged: str
    """The method that the ratios and heat maps are of."""
    turns: AtLeastOne = 3
    max_tokens: AtLeastOne = 64
    top_k: AtLeastOne | None = None
    draft_sample_method: str | None = None
    max_candidates: AtLeastOne = 20
    max_model_len: AtLeastOne = 1024
    kv_cache_mib: AtLeastOne = 512
    warm_up_tokens: AtLeastOne = 16
    eager: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Campaign:
        (judged,) = parse_methods([self.judged])
        seen: set[tuple[float, int]] = set()
        for part in self.parts:
            if judged.label not in part.methods:
                raise ValueError(f"judged {self.judged!r} must be among the methods of every part")
            if "off" not in part.methods:
                raise ValueError("every part needs the method off: ratios are over it")
            for batch in part.batches:
                if (part.temperature, batch) in seen:
                    raise ValueError(f"temperature {part.temperature:g}, batch {batch} stands in two places; keep one")
                seen.add((part.temperature, batch))
        return self

    @property
    def methods(self) -> list[Method]:
        """Of all parts, each once."""
        return parse_methods(list(dict.fromkeys(label for part in self.parts for label in part.methods)))

    def methods_by_cell(self) -> dict[str, list[str]]:
        """Labels by temperature and batch, as the raw file's run rows keep them: ``{"0/1": [...]}``."""
        return {f"{part.temperature:g}/{batch}": part.methods for part in self.parts for batch in part.batches}

    def prompts_needed(self) -> int:
        """Prompts a set: of the largest cell, in all turns."""
        return max(batch * part.groups * self.turns for part in self.parts for batch in part.batches)


def load(path: Path) -> Campaign:
    """Read and check a file.

    Raises:
        ValueError: no such file, no YAML, or what the schema refuses; one line, with the field.
    """
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Campaign.model_validate(content)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {str(error).splitlines()[0]}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(f"{path}: {place}: {first['msg'].removeprefix('Value error, ')}") from None
