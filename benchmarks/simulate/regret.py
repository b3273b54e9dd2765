# SPDX-License-Identifier: Apache-2.0
"""What a run lost against the best rule in hindsight, over its tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.simulate.server import Run
from benchmarks.simulate.streams import Array

FIRST, WINDOW = 2000, 500
"""Tokens of the cold start, and of the window that the worst loss is looked for in."""
FIRST_ROUNDS, WINDOW_ROUNDS = 128, 32
"""Both are this many rounds without drafting at least: 500 tokens of a batch of 64 are eight rounds, all noise."""


@dataclass(frozen=True)
class Regret:
    """Shares of the time, against the best rule in hindsight; negative where the run was faster."""

    first: float
    """Over the first tokens."""
    worst: float
    """Over any window."""
    after: float
    """After the first tokens."""
    tried: float
    """After the first tokens: lost in rounds that were tried without being expected to pay."""


def regret(run: Run, best: Run, batch: int) -> Regret:
    """Compare at equal numbers of tokens, up to where the shorter run ends."""
    size = min(run.tokens[-1], best.tokens[-1])
    first, window = min(spans(batch)[0], size), min(spans(batch)[1], size)
    mine, theirs = run.at([first, size]), best.at([first, size])
    starts = np.arange(0, size - window + 1, max(window // 10, 1)).astype(np.float64)
    lost = _loss(_span(run, starts, window), _span(best, starts, window))
    rate = (size - first) / max(theirs[1] - theirs[0], 1e-9)
    late = [(seconds, tokens) for before, seconds, tokens in run.trials if before >= first]
    spent = sum(seconds - tokens / rate for seconds, tokens in late) / max(mine[1] - mine[0], 1e-9)
    after = float(_loss(mine[1] - mine[0], theirs[1] - theirs[0])) if size > first else 0.0
    return Regret(float(_loss(mine[0], theirs[0])), float(lost.max()), after, float(spent))


def spans(batch: int) -> tuple[int, int]:
    """Tokens of the start and of a window."""
    return max(FIRST, FIRST_ROUNDS * batch), max(WINDOW, WINDOW_ROUNDS * batch)


def curve(run: Run, best: Run, num: int = 60) -> tuple[Array, Array]:
    """Tokens, and the loss over all of them up to there."""
    size = min(run.tokens[-1], best.tokens[-1])
    tokens = np.linspace(size / num, size, num)
    return tokens, _loss(run.at(tokens), best.at(tokens))


def _loss(mine: Array, theirs: Array) -> Array:
    return 1 - theirs / mine


def _span(run: Run, starts: Array, window: int) -> Array:
    return run.at(starts + window) - run.at(starts)
