# SPDX-License-Identifier: Apache-2.0
"""Texts to serve in the simulator: for every output position, whether the draft's token there is accepted.

So all rules meet the same text, wherever their rounds start. Each prompt is a new request: a recorded one as long as it
was, one of a made-up text :data:`PROMPT_TOKENS` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllm_specdecpp.data.shards import open_dataset

Array = NDArray[np.float64]
DEPTH = 16
PROMPT_TOKENS = 128
STREAMS = ("markov", "overconfident", "underconfident", "flat", "nan", "poor", "rich", "shift", "inverted")


@dataclass
class Stream:
    """Text of one or more requests, end to end."""

    scores: Array  # [num_positions, DEPTH] score of candidate j drawn in a round that starts at the position
    run: NDArray[np.int64]  # [num_positions] candidates accepted from the position on, at most limit
    limit: NDArray[np.int64]  # [num_positions] candidates that the record knows of
    prompt: NDArray[np.int64]  # [num_positions] 0, 1, 2, ...: which request of the stream the position is of


def windows(accept: Array, score: Array) -> Stream:
    """From one acceptance and one score per position, with a new prompt every :data:`PROMPT_TOKENS` positions."""
    size = len(accept)
    run = np.zeros(size + DEPTH + 1, dtype=np.int64)
    for i in range(size - 1, -1, -1):
        run[i] = run[i + 1] + 1 if accept[i] else 0
    padded = np.concatenate([score, np.full(DEPTH, 0.5)])
    scores = np.lib.stride_tricks.sliding_window_view(padded, DEPTH)[:size]
    return Stream(scores, run[:size], np.full(size, DEPTH), np.arange(size) // PROMPT_TOKENS)


def markov(rng: np.random.Generator, n: int, good: float, bad: float, stay: float) -> Array:
    """Acceptance probability per position: two moods, and a spread within each."""
    state = np.cumsum(rng.random(n) > stay) % 2
    return sigmoid(np.where(state == 0, _logit(good), _logit(bad)) + rng.normal(0, 1.0, n))


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _logit(p: Array | float) -> Array:
    return np.log(p / (1 - np.asarray(p)))


def make(name: str, n: int, seed: int) -> Stream:
    """A stream of ``n`` positions."""
    rng = np.random.default_rng(seed)
    if name == "markov":  # informative, calibrated up to noise
        p = markov(rng, n, 0.95, 0.4, 0.85)
        score = sigmoid(_logit(p) + rng.normal(0, 0.7, n))
    elif name == "overconfident":
        p = markov(rng, n, 0.95, 0.4, 0.85)
        score = sigmoid(2.0 * _logit(p) + 1.5 + rng.normal(0, 1.0, n))
    elif name == "underconfident":  # a head trained with w_rej = 6
        p = markov(rng, n, 0.95, 0.4, 0.85)
        score = sigmoid(0.7 * _logit(p) - 1.8 + rng.normal(0, 0.7, n))
    elif name == "flat":  # scores say nothing
        p, score = np.full(n, 0.75), rng.random(n)
    elif name == "nan":  # no scores
        p, score = np.full(n, 0.75), np.full(n, np.nan)
    elif name == "poor":
        p = markov(rng, n, 0.25, 0.05, 0.8)
        score = sigmoid(_logit(p) + 3 + rng.normal(0, 1.0, n))  # and says that it is good
    elif name == "rich":
        p = markov(rng, n, 0.99, 0.9, 0.9)
        score = sigmoid(_logit(p) + rng.normal(0, 0.7, n))
    elif name == "shift":  # three workloads, calibrated differently
        third = n // 3
        parts = [markov(rng, third, 0.97, 0.7, 0.9), markov(rng, third, 0.3, 0.05, 0.8)]
        parts.append(markov(rng, n - 2 * third, 0.93, 0.4, 0.85))
        p = np.concatenate(parts)
        bias = np.repeat([0.0, 2.5, -1.0], [third, third, n - 2 * third])
        score = sigmoid(_logit(p) + bias + rng.normal(0, 0.7, n))
    elif name == "inverted":  # a broken estimator: the surer, the worse
        p = markov(rng, n, 0.95, 0.4, 0.85)
        score = sigmoid(-_logit(p))
    else:
        raise ValueError(f"specdecpp: --streams {name} is unknown; choose among {', '.join(STREAMS)}, recorded")
    return windows((rng.random(n) < p).astype(float), score)


def recorded(folder: Path, n: int, seed: int, which: str | None = None) -> Stream:
    """A dataset of ``vllm-specdecpp collect``, prompts in random order over and over, scored by the draft's confidence.

    A round may start inside an accepted run.

    Args:
        folder: of the dataset.
        n: positions, at least.
        seed: of the order.
        which: only the prompts of this set.

    Raises:
        ValueError: no dataset there, or no round of that set.
    """
    rounds: dict[tuple[int, int], list[tuple[list[float], int]]] = {}  # (shard, prompt) -> (scores, accepted)
    for number, shard in enumerate(open_dataset(folder).shards()):
        top1, starts = shard.top1_prob.tolist(), shard.round_starts.tolist()
        for at, prompt in enumerate(shard.prompt_index.tolist()):
            if which in (None, shard.prompts[prompt]["set"]):
                scores = top1[starts[at] : starts[at + 1]]
                rounds.setdefault((number, prompt), []).append((scores, int(shard.num_accepted[at])))
    if not rounds:
        raise ValueError(f"specdecpp: {folder} has no round of set {which!r}; name another set, or collect more")
    rng = np.random.default_rng(seed)
    prompts = list(rounds.values())
    table: list[list[float]] = []
    runs: list[int] = []
    limits: list[int] = []
    owners: list[int] = []
    served = 0
    while len(runs) < n:
        for i in rng.permutation(len(prompts)):
            for scores, run in prompts[i]:
                for start in range(min(run + 1, len(scores))):
                    table.append((scores[start:] + [0.5] * DEPTH)[:DEPTH])
                    runs.append(run - start)
                    limits.append(len(scores) - start)
                    owners.append(served)
            served += 1
    return Stream(np.array(table), np.array(runs), np.array(limits), np.array(owners))
