# SPDX-License-Identifier: Apache-2.0
"""Sources of candidates that need no draft pass: a run costs its rows in the verification, and nothing else.

A new source is one class with the members of :class:`RunSource`, and one entry in ``source_registry``. The draft model
is no :class:`RunSource`: what it proposes is drawn, step by step, by an engine.

Lossless: a run is a function of the prefix, the candidates in front of it among it, and at most of what other requests
have emitted, so its q is one-hot. Which run is taken and where it is cut depends on the run itself, on what it is a
function of and on past rounds, never on what the target draws: rejection sampling gives the target's law.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.integer[Any]]


class RunSource(Protocol):
    """Proposes a run of candidates from a request's own tokens."""

    name: str
    depends_on: str
    """Which random variables its runs are functions of."""

    start: tuple[float, float]
    """Slope and common intercept of a candidate's log-odds of acceptance in its x, before anything was seen."""

    def run(self, tokens: Tokens, most: int) -> tuple[Tokens, NDArray[np.float64]]:
        """What may follow.

        Args:
            tokens: [num_tokens] prompt and output, the last emitted token included.
            most: candidates at most, 1 or more.

        Returns:
            [length] candidates, and x of each: what its chance is estimated from. Empty: nothing to propose.
        """


@dataclass(frozen=True)
class Run:
    """What a source proposes for a request."""

    source: str
    token_ids: list[int]
    x: NDArray[np.float64]  # [length]


def propose(sources: Sequence[RunSource], tokens: Tokens, most: int, stop_token_ids: Sequence[int] = ()) -> list[Run]:
    """What each source proposes for a request: arguments as in :meth:`RunSource.run`; a stop token ends a run."""
    runs = []
    stops = set(stop_token_ids)
    for source in sources:
        found, x = source.run(tokens, most)
        token_ids = found.tolist()
        end = next((i for i, token in enumerate(token_ids, 1) if token in stops), len(token_ids))
        if end:
            runs.append(Run(source.name, token_ids[:end], x[:end]))
    return runs
