# SPDX-License-Identifier: Apache-2.0
"""Every option of the method ``specdecpp``, in one schema: the single source for the CLI, the dict and the worker."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from vllm_specdecpp.rule_registry import RULES, one_of_the_rules
from vllm_specdecpp.source_registry import DRAFT_MODEL, RUN_SOURCES, one_of_the_sources

_MUST_BE = {
    "model": "must name the draft model: a folder or a hub id (e.g. 'Qwen/Qwen2.5-Coder-0.5B-Instruct')",
    "head": "must name the acceptance head: a folder or a hub id, or be left out for a training-free rule",
    "head_revision": "must be a branch, tag or commit of the head's hub repository (e.g. 'main')",
    "threshold": "must lie strictly between 0 and 1 (e.g. 0.7)",
    "num_speculative_tokens": "must be a whole number from 1 to 128 (e.g. 20)",
    "min_speculative_tokens": "must be a whole number from 1 to num_speculative_tokens (e.g. 1)",
    "suffix_cache": "must be 'request', or 'engine' to look in other requests' outputs as well",
    "trace_rounds": "must be a whole number, 0 or more (e.g. 0 to keep counters only)",
}


class SpecDecPPConfig(BaseModel):
    """The options of one engine.

    Raises:
        pydantic.ValidationError: (a ``ValueError``) for a bad option; the classmethods flatten it to one line.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    model: str = Field(min_length=1)
    """Draft model: a folder or a hub id. Must have the target's tokens; how far the two are padded may differ.
    Left out for a known pair, and with ``sources: ["suffix"]``."""

    head: str | None = Field(default=None, min_length=1)
    """Acceptance head of the rules ``cost_aware`` and ``threshold``: a folder or a hub id, ``org/name`` or
    ``org/name/folder/in/it``. Without one, ``cost_aware`` reads the draft's top-1 probability."""

    head_revision: str | None = Field(default=None, min_length=1)
    """Branch, tag or commit of the head's hub repository."""

    rule: str | None = None
    """Stop rule; by default ``cost_aware``, which weighs each candidate against its measured time. With a
    ``threshold``, or a ``min_speculative_tokens`` above 1: ``threshold`` (the paper's) if there is a head, else
    ``confidence``."""

    threshold: float | None = Field(default=None, gt=0, lt=1)
    """h, of the rules ``threshold``, ``confidence`` and ``entropy``: drafting stops once the estimated probability that
    some candidate is rejected, 1 - survival, exceeds it. Strictly between 0 and 1."""

    sources: list[str] | None = None
    """Where candidates come from: ``draft_model``, and ``suffix``: what followed the last time that the request's last
    tokens stood in its prompt or output, which costs no draft pass. By default both under ``cost_aware``, which weighs
    them against each other; the other rules have the draft model alone. ``["suffix"]`` needs no draft model: leave
    ``model`` out. A source of your own runs on Model Runner V1.
    V2 has no ``suffix`` where the draft model must read every token at once (``docs/sources.md``)."""

    suffix_cache: Literal["request", "engine"] = "request"
    """Where ``suffix`` looks: in the request's own text, or with ``engine`` also in what other requests have emitted.
    One request's timing then tells of another's text: leave it off where users must not learn of each other."""

    num_speculative_tokens: int = Field(default=20, ge=1, le=128)
    """Upper bound on the candidate length K (vLLM's name for it), 1 to 128. On GPUs the default is 10 or less
    (`docs/gpu.md`)."""

    min_speculative_tokens: int = Field(default=1, ge=1)
    """Candidates a round has at least; only an end-of-sequence token or the request's own limits go below it. Not for
    ``cost_aware``, which drafts nothing where that is faster."""

    trace_rounds: int = Field(default=0, ge=0)
    """How many of the last rounds are kept for inspection; 0 keeps counters only."""

    @field_validator("rule")
    @classmethod
    def _known_rule(cls, rule: str | None) -> str | None:
        if rule is not None and rule not in RULES:
            raise ValueError(one_of_the_rules())
        return rule

    @field_validator("sources")
    @classmethod
    def _known_sources(cls, sources: list[str] | None) -> list[str] | None:
        if sources is not None:
            known = {*RUN_SOURCES, DRAFT_MODEL}
            if not sources or not known.issuperset(sources) or len(set(sources)) < len(sources):
                raise ValueError(one_of_the_sources())
        return sources

    @model_validator(mode="after")
    def _check_together(self, info: ValidationInfo) -> SpecDecPPConfig:
        if self.min_speculative_tokens > self.num_speculative_tokens:
            raise ValueError(
                f"min_speculative_tokens={self.min_speculative_tokens} exceeds "
                f"num_speculative_tokens={self.num_speculative_tokens}; lower the first or raise the second"
            )
        entry = RULES[self.resolved_rule]
        if entry.needs_head and self.head is None:
            raise ValueError(
                f"rule={entry.name!r} needs an acceptance head; add head=FOLDER_OR_HUB_ID, or use rule='confidence'"
            )
        # A running engine keeps its head and its sources while another rule is tried out.
        may_idle = bool(info.context and info.context.get("running"))
        if self.head is not None and not entry.reads_head and not may_idle:
            raise ValueError(f"rule={self.rule!r} does not use head={self.head!r}; leave one of the two out")
        if self.head_revision is not None and self.head is None:
            raise ValueError(f"head_revision={self.head_revision!r} has no head to go with; add head=HUB_ID or drop it")
        if self.threshold is not None and entry.threshold is None:
            raise ValueError(
                f"threshold={self.threshold} has no meaning with rule={self.rule!r}; leave one of the two out"
            )
        if self.resolved_rule == "cost_aware" and self.min_speculative_tokens > 1:
            raise ValueError(
                f"min_speculative_tokens={self.min_speculative_tokens} has no meaning with rule='cost_aware', which "
                "drafts nothing where that is faster; leave it out, or add rule='threshold' or 'confidence'"
            )
        if not self.drafts and self.head is not None:
            raise ValueError(
                f"sources={self.sources} has no draft model that head={self.head!r} could be of; leave one of the "
                "two out"
            )
        may_idle = may_idle and self.drafts
        if self.sources is not None and self.run_sources and entry.name != "cost_aware" and not may_idle:
            raise ValueError(
                f"sources={self.sources} needs rule='cost_aware', which weighs them against each other, not "
                f"rule={self.resolved_rule!r}; leave one of the two out"
            )
        takes_runs = "suffix" in self.run_sources and entry.name == "cost_aware"
        if self.suffix_cache != "request" and not takes_runs and not may_idle:
            raise ValueError(
                f"suffix_cache={self.suffix_cache!r} needs the source 'suffix' and rule='cost_aware', which takes its "
                "runs; leave it out, or add them"
            )
        return self

    @property
    def run_sources(self) -> list[str]:
        """The sources beside the draft model, by name; only ``cost_aware`` takes their runs."""
        if self.sources is None:
            return list(RUN_SOURCES)
        return [name for name in self.sources if name != DRAFT_MODEL]

    @property
    def drafts(self) -> bool:
        """Whether there is a draft model; without one ``model`` is the target's name."""
        return self.sources is None or DRAFT_MODEL in self.sources

    @property
    def resolved_rule(self) -> str:
        """The rule in force."""
        if self.rule is not None:
            return self.rule
        if self.threshold is None and self.min_speculative_tokens == 1:
            return "cost_aware"
        return "threshold" if self.head is not None else "confidence"

    @property
    def resolved_threshold(self) -> float | None:
        """The threshold h in force; None for a rule without one."""
        return self.threshold if self.threshold is not None else RULES[self.resolved_rule].threshold

    @classmethod
    def from_speculative_config(
        cls, speculative_config: Mapping[str, Any], passthrough: Collection[str]
    ) -> tuple[SpecDecPPConfig, dict[str, Any]]:
        """Split the user's dict into our options and vLLM's.

        Args:
            speculative_config: e.g. ``{"method": "specdecpp", "model": ..., "threshold": 0.5}``; None: the default.
            passthrough: the field names of ``vllm.config.SpeculativeConfig``.

        Returns:
            Our options, and what goes on to vLLM: the pass-through keys, ``model`` and ``num_speculative_tokens``.

        Raises:
            ValueError: one line naming the option, its value and the mend.
        """
        ours: dict[str, Any] = {}
        passed_on: dict[str, Any] = {}
        for name, value in speculative_config.items():
            value = _plain(value)
            if name in cls.model_fields:
                ours[name] = value
            elif name in passthrough:
                passed_on[name] = value
            elif name != "method":
                raise ValueError(_unknown(name, value, [*cls.model_fields, *passthrough]))
        passed_on.pop("method", None)
        config = cls._checked({name: value for name, value in ours.items() if value is not None})
        passed_on |= {"model": config.model, "num_speculative_tokens": config.num_speculative_tokens}
        return config, passed_on

    def to_additional_config(self) -> dict[str, Any]:
        """What travels in vLLM's ``additional_config``: JSON-serialisable, without the options left at None."""
        return self.model_dump(mode="json", exclude_none=True)

    @classmethod
    def from_additional_config(cls, options: Mapping[str, Any]) -> SpecDecPPConfig:
        """The inverse of :meth:`to_additional_config`.

        Raises:
            ValueError: one line naming the option, its value and the mend.
        """
        return cls._checked(dict(options))

    def with_changes(self, changes: Mapping[str, Any]) -> SpecDecPPConfig:
        """These options with some replaced while the engine runs.

        A new ``rule`` starts with its own defaults unless others are given. A head that is loaded may stay unused.

        Raises:
            ValueError: one line; an unknown option, a bad value, or an option that is fixed at start-up.
        """
        for name in ("model", "head", "head_revision", "sources", "suffix_cache"):
            if name in changes:
                raise ValueError(f"specdecpp: {name}={changes[name]!r} cannot change at run time; restart with it")
        options = self.model_dump(exclude_none=True)
        if changes.get("rule", self.resolved_rule) != self.resolved_rule:
            options.pop("threshold", None)
        for name, value in changes.items():
            options.pop(name, None)
            if value is not None:
                options[name] = value
        return self._checked(options, running=True)

    @classmethod
    def _checked(cls, options: dict[str, Any], *, running: bool = False) -> SpecDecPPConfig:
        """Validate, with pydantic's report flattened to one line."""
        options = {name: _plain(value) for name, value in options.items()}
        for name, value in options.items():
            if name not in cls.model_fields:
                raise ValueError(_unknown(name, value, list(cls.model_fields)))
        try:
            return cls.model_validate(options, context={"running": running})
        except ValidationError as error:
            parts = dict.fromkeys(_one_line(entry) for entry in error.errors())
            raise ValueError("specdecpp: " + "; ".join(parts)) from None


def _one_line(entry: Mapping[str, Any]) -> str:
    """One entry of ``pydantic.ValidationError.errors()`` as option, value and mend."""
    if not entry["loc"]:  # from _check_together, which words its own messages
        return str(entry["msg"]).removeprefix("Value error, ")
    name = str(entry["loc"][0])
    must_be = {"rule": one_of_the_rules, "sources": one_of_the_sources}.get(name, lambda: _MUST_BE[name])()
    if entry["type"] == "missing":
        return f"{name} is missing; it {must_be}"
    if entry["type"] in ("int_type", "float_type") and isinstance(entry["input"], str):
        return f"{name}={entry['input']!r} is text; write the number without quotes: it {must_be}"
    return f"{name}={entry['input']!r} {must_be}"


def _plain(value: Any) -> Any:
    """A path as text, a NumPy scalar as Python's own."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0 else value


def _unknown(name: str, value: object, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name.lower(), known, n=1)
    mend = f"did you mean {nearest[0]!r}?" if nearest else f"our options are {', '.join(SpecDecPPConfig.model_fields)}"
    return f"specdecpp: unknown option {name}={value!r}; {mend}"
