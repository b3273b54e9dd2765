# SPDX-License-Identifier: Apache-2.0
"""Requests to serve in the simulator: for every output position, whether the draft's token there is accepted.

So all rules meet the same text, wherever their rounds start. A request has a prompt to read and an output, as long as
they were recorded; of made-up ones both lengths are log-normal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_specdecpp.data.shards import open_dataset
from vllm_specdecpp.training.collect.responses import read_responses

Array = NDArray[np.float64]
Counts = NDArray[np.int64]
DEPTH = 16
PROMPT_TOKENS, OUTPUT_TOKENS, SPREAD = 150, 128, 0.6
"""Of made-up requests: medians, and the standard deviation of the lengths' logarithms."""
MAX_PROMPT, MAX_OUTPUT = 2000, 512
STREAMS = (
    "markov", "overconfident", "underconfident", "flat", "nan", "poor", "rich", "shift", "inverted", "mixed",
)  # fmt: skip
MIXED = ("rich", "poor", "markov", "overconfident", "flat")
"""Kinds of text that the requests of ``mixed`` are of, in random order."""


@dataclass
class Stream:
    """The outputs of some requests, end to end. All but the last end where the text says so."""

    scores: Array  # [num_positions, DEPTH] score of candidate j drawn in a round that starts at the position
    run: Counts  # [num_positions] candidates accepted from the position on, at most to the request's end
    starts: Counts  # [num_requests + 1] first position of each request, and the number of positions
    prompt_tokens: Counts  # [num_requests]
    max_tokens: int  # of an output: the rule sees this bound, not where the output ends

    def __len__(self) -> int:
        return len(self.run)


def requests(accept: Array, score: Array, starts: Counts, prompt_tokens: Counts, max_tokens: int) -> Stream:
    """From one acceptance and one score per position."""
    last = np.zeros(len(accept), dtype=np.bool_)
    last[starts[1:] - 1] = True
    run = np.zeros(len(accept), dtype=np.int64)
    for i in range(len(accept) - 2, -1, -1):
        run[i] = run[i + 1] + 1 if accept[i] and not last[i] else 0
    padded = np.concatenate([score, np.full(DEPTH, score[-1])])
    scores = np.lib.stride_tricks.sliding_window_view(padded, DEPTH)[: len(accept)]
    return Stream(scores, np.minimum(run, DEPTH), starts, prompt_tokens, max_tokens)


def lengths(rng: np.random.Generator, median: int, most: int, total: int) -> Counts:
    """Log-normal lengths whose sum is ``total`` or more."""
    drawn = np.exp(rng.normal(np.log(median), SPREAD, total // 8 + 1)).astype(np.int64)
    drawn = np.minimum(np.maximum(drawn, 8), most)
    return drawn[: 1 + int(np.searchsorted(drawn.cumsum(), total))]


def markov(rng: np.random.Generator, n: int, good: float, bad: float, stay: float) -> Array:
    """Acceptance probability per position: two moods, and a spread within each."""
    state = np.cumsum(rng.random(n) > stay) % 2
    return sigmoid(np.where(state == 0, _logit(good), _logit(bad)) + rng.normal(0, 1.0, n))


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _logit(p: Array | float) -> Array:
    return np.log(p / (1 - np.asarray(p)))


def make(name: str, n: int, seed: int) -> Stream:
    """A stream of ``n`` positions.

    Raises:
        ValueError: no such stream.
    """
    rng = np.random.default_rng(seed + 7_000_000)
    outputs = lengths(rng, OUTPUT_TOKENS, MAX_OUTPUT, n)
    outputs[-1] -= outputs.sum() - n
    starts = np.concatenate([[0], outputs.cumsum()])
    prompts = np.exp(rng.normal(np.log(PROMPT_TOKENS), SPREAD, len(outputs))).astype(np.int64)
    if name == "mixed":
        kinds = rng.integers(len(MIXED), size=len(outputs))
        texts = [positions(kind, n, seed + i) for i, kind in enumerate(MIXED)]
        of = np.repeat(kinds, outputs)
        accept, score = (np.choose(of, [text[part] for text in texts]) for part in (0, 1))
    else:
        accept, score = positions(name, n, seed)
    return requests(accept, score, starts, np.minimum(np.maximum(prompts, 8), MAX_PROMPT), MAX_OUTPUT)


def positions(name: str, n: int, seed: int) -> tuple[Array, Array]:
    """[n] whether the draft's token is accepted, and its score: of one kind of text."""
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
    return (rng.random(n) < p).astype(float), score


def recorded(folder: Path, n: int, seed: int, which: str | None = None) -> Stream:
    """A dataset of ``vllm-specdecpp collect``, requests in random order over and over; scores: the draft's confidence.

    A round may start inside an accepted run. Where all candidates of a recorded round were accepted nobody knows what
    the draft's next one would have been: it is put in, accepted as often as the others of that request, so that long
    drafts are not cut off where the record's rounds were.

    Args:
        folder: of the dataset.
        n: positions, at least.
        seed: of the order.
        which: only the requests of this set.

    Raises:
        ValueError: no dataset there, or no round of that set.
    """
    texts = list(_recorded(folder, which))
    if not texts:
        raise ValueError(f"specdecpp: {folder} has no round of set {which!r}; name another set, or collect more")
    rng = np.random.default_rng(seed)
    order: list[int] = []
    while sum(len(texts[i][1]) for i in order) < n:
        order += rng.permutation(len(texts)).tolist()
    chosen = [texts[i] for i in order]
    starts = np.concatenate([[0], np.cumsum([len(run) for _, run, _ in chosen])])
    prompts = np.array([prompt for _, _, prompt in chosen])
    most = 1 + max(len(run) for _, run, _ in texts)  # the first token is the prefill's
    return Stream(
        np.concatenate([scores for scores, _, _ in chosen]), np.concatenate([run for _, run, _ in chosen]),
        starts, prompts, most,
    )  # fmt: skip


def _recorded(folder: Path, which: str | None) -> Iterator[tuple[Array, Counts, int]]:
    """Scores, runs and prompt length of each request; both of one row a position."""
    responses = {(row["set"], row["id"]): row for row in read_responses(folder)}
    for shard in open_dataset(folder).shards():
        rounds: dict[int, list[tuple[list[float], int]]] = {}  # prompt -> (scores, accepted)
        top1, starts = shard.top1_prob.tolist(), shard.round_starts.tolist()
        for at, prompt in enumerate(shard.prompt_index.tolist()):
            if which in (None, shard.prompts[prompt]["set"]):
                scores = top1[starts[at] : starts[at + 1]]
                rounds.setdefault(prompt, []).append((scores, int(shard.num_accepted[at])))
        for prompt, its in rounds.items():
            response = responses.get((shard.prompts[prompt]["set"], shard.prompts[prompt]["id"]))
            yield _text(its, response, np.random.default_rng(prompt))


def _text(
    rounds: list[tuple[list[float], int]], response: dict[str, Any] | None, rng: np.random.Generator
) -> tuple[Array, Counts, int]:
    seen = sum(min(run + 1, len(scores)) for scores, run in rounds)
    often = sum(run for _, run in rounds) / seen
    accept: list[bool] = []
    score: list[float] = []
    tails: list[list[float]] = []  # of each position: scores of its round's candidates from there on
    whole: list[bool] = []  # whether the text goes on as that round's candidates said
    for scores, run in rounds:
        for start in range(run + 1):
            known = start < len(scores)
            accept.append(start < run or (not known and bool(rng.random() < often)))
            score.append(scores[min(start, len(scores) - 1)])
            tails.append(scores[start:])
            whole.append(run == len(scores))
    size = len(accept) if response is None else min(len(accept), max(len(response["token_ids"]) - 1, 1))
    end = np.array([0, size])
    text = requests(np.array(accept[:size], dtype=np.float64), np.array(score[:size]), end, end, size)
    table = text.scores.copy()
    for at in range(size):
        if not whole[at]:  # after the first rejection: what the draft went on to say
            tail = tails[at][:DEPTH]
            table[at] = tail + tail[-1:] * (DEPTH - len(tail))
    return table, text.run, 150 if response is None else len(response["prompt_token_ids"])
