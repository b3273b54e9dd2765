# SPDX-License-Identifier: Apache-2.0
"""The sources of candidates that there are: one table, which the options and their errors go by.

A new source of runs is one class with the members of :class:`vllm_specdecpp.decision.sources.RunSource`, and one
:func:`register` at the end of this module. The table does not import the sources, so that options can be read without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_specdecpp.decision.sources import RunSource

DRAFT_MODEL = "draft_model"
"""The source that is no :class:`RunSource`; what it proposes is drawn, step by step."""
ON_DEVICE = ("suffix",)
"""Sources of runs that Model Runner V2 has: it looks for them on the device (``kernels.suffix_match``)."""
RUN_SOURCES: dict[str, Callable[[], RunSource]] = {}
"""Every source of runs, by name."""


def register(name: str, make: Callable[[], RunSource]) -> None:
    """Add a source of runs; every process of an engine must do so.

    Raises:
        ValueError: the name is taken.
    """
    if name in RUN_SOURCES or name == DRAFT_MODEL:
        raise ValueError(f"specdecpp: there is a source {name!r} already; choose another name")
    RUN_SOURCES[name] = make


def make_sources(names: Sequence[str], suffix_cache: str = "request") -> list[RunSource]:
    """The sources of runs among ``names``; ``suffix_cache`` is the option of that name."""
    made = [RUN_SOURCES[name]() for name in names if name != DRAFT_MODEL]
    if suffix_cache == "engine":
        from vllm_specdecpp.decision.sources.suffix import SuffixSource
        from vllm_specdecpp.decision.sources.suffix_cache import SuffixCache

        made = [SuffixSource(SuffixCache()) if isinstance(source, SuffixSource) else source for source in made]
    return made


def one_of_the_sources() -> str:
    """The end of an error's line: which sources there are."""
    return f"must name one or more of {', '.join(map(repr, [*RUN_SOURCES, DRAFT_MODEL]))}, each once"


def has_no_draft(user: Mapping[str, Any]) -> bool:
    """Whether a speculative config asks for free runs alone.

    vLLM is then told of the target as its own draft model, which is never loaded (``engine.v1.runs_only``,
    ``engine.v2.runs_only``).

    Raises:
        ValueError: a draft model is named all the same.
    """
    sources = user.get("sources")
    if not isinstance(sources, list) or not sources or DRAFT_MODEL in sources:
        return False
    if user.get("model"):
        raise ValueError(
            f"specdecpp: model={user['model']!r} would never draft with sources={sources}; leave one of the two out, "
            "or add 'draft_model' to the sources"
        )
    return True


def _suffix() -> RunSource:
    from vllm_specdecpp.decision.sources.suffix import SuffixSource

    return SuffixSource()


register("suffix", _suffix)
