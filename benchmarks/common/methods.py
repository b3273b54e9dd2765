# SPDX-License-Identifier: Apache-2.0
"""The methods a benchmark compares, as written on the command line: ``name[@draft][:key=value,...]``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

OFF = "off"
NATIVE = "draft_model"
NGRAM, SUFFIX = "ngram", "suffix"

PADDING, RUNS = "padding", "runs"
# What `specdecpp_configure` takes besides the rule's name, and how each value is read; padding=0, which verifies at the
# width that vLLM would; and runs=0, which proposes no free runs, or runs=2, which also looks for them in what other
# requests have emitted.
RULE_OPTIONS: dict[str, type] = {
    "threshold": float,
    "num_speculative_tokens": int,
    "min_speculative_tokens": int,
    PADDING: int,
    RUNS: int,
}
# vLLM's own methods; ngram's min and max are `prompt_lookup_min` and `prompt_lookup_max`.
VLLM_OPTIONS: dict[str, dict[str, type]] = {
    OFF: {},
    NATIVE: {"K": int},
    NGRAM: {"K": int, "min": int, "max": int},
    SUFFIX: {"K": int},
}


@dataclass(frozen=True)
class Method:
    """One column of a benchmark: speculation off, one of vLLM's own methods, or one of our stop rules.

    ``draft`` names another draft model than the pair's, where a benchmark has several.
    """

    name: str
    options: tuple[tuple[str, int | float], ...] = ()
    draft: str = ""

    @property
    def label(self) -> str:
        """The canonical spelling, which is the ``method`` of the result rows."""
        name = f"{self.name}@{self.draft}" if self.draft else self.name
        if not self.options:
            return name
        return name + ":" + ",".join(f"{key}={value:g}" for key, value in self.options)

    @property
    def is_rule(self) -> bool:
        """True for a stop rule of ours (everything but vLLM's own methods)."""
        return self.name not in VLLM_OPTIONS

    @property
    def fixed_k(self) -> int | None:
        """K of vLLM's own draft_model, None for every other method."""
        return int(dict(self.options)["K"]) if self.name == NATIVE else None


def parse_method(text: str) -> Method:
    """Read ``off``, ``draft_model:4``, ``ngram:K=4,min=2,max=5``, ``suffix:24`` or ``rule[@draft][:option=value,...]``.

    Raises:
        ValueError: unknown option, a value that is no number, an option given twice, a method of vLLM without its K.
    """
    head, colon, rest = text.partition(":")
    name, _, draft = head.partition("@")
    if draft and not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", draft):
        raise ValueError(f"method {text!r}: {draft!r} is no draft's name; write name@draft, e.g. cost_aware@32k")
    if not re.fullmatch(r"[a-z][a-z_0-9]*", name) or (colon and not rest):
        raise ValueError(
            f"method {text!r}: write name[:option=value,...], e.g. draft_model:4, confidence:threshold=0.6"
        )
    known = VLLM_OPTIONS.get(name, RULE_OPTIONS)
    if "K" in known and rest.isdigit():
        rest = f"K={rest}"
    options: dict[str, int | float] = {}
    for item in rest.split(",") if rest else []:
        key, _, value = item.partition("=")
        if key not in known:
            takes = ", ".join(known) or "no options"
            raise ValueError(f"method {text!r}: unknown option {key!r}; {name} takes {takes}")
        if key in options:
            raise ValueError(f"method {text!r}: option {key!r} is given twice; keep one")
        try:
            options[key] = known[key](value)
        except ValueError:
            raise ValueError(f"method {text!r}: {key}={value!r} is not a {known[key].__name__}") from None
    if "K" in known and options.get("K", 0) < 1:
        raise ValueError(f"method {text!r}: {name} needs its K >= 1, e.g. {name}:4")
    return Method(name, tuple((key, options[key]) for key in known if key in options), draft)


def parse_methods(texts: list[str]) -> list[Method]:
    """Read every method of a command line; ValueError when one is there twice."""
    methods = [parse_method(text) for text in texts]
    for method in methods:
        if methods.count(method) > 1:
            raise ValueError(f"method {method.label!r} is given twice; name each method once")
    return methods


def rotated(methods: Sequence[Method], turn: int) -> list[Method]:
    """The order of turn ``turn``: each method comes first equally often, so the machine's drift hits all alike."""
    start = turn % len(methods)
    return [*methods[start:], *methods[:start]]
