# SPDX-License-Identifier: Apache-2.0
"""Text repeats itself: what followed the last time that the same tokens stood there, may follow again."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_specdecpp.decision.sources.suffix_cache import SuffixCache

Tokens = NDArray[np.integer[Any]]

MAX_MATCH = 64
"""Tokens compared at most: longer matches are no surer."""
LATEST, PLACES, NARROW = 2048, 32, 8
"""Of the latest 2048 places where the last token stands, if more than 32: those where up to 8 tokens match, and of
these the latest."""


class SuffixSource:
    """The run behind the longest earlier occurrence of the request's last tokens, in its own prompt and output.

    No index is kept: the tokens are searched anew in each round, so nothing can be stale after a preemption or a prefix
    hit, and nothing but the cache is held between rounds. 32,768 tokens take 34 to 97 microseconds
    (``benchmarks.simulate.overhead --runs``).

    The chance of a candidate is estimated from the logarithm of how many tokens match before it: those found, and the
    candidates of the run before it.

    Args:
        cache: other requests' outputs, searched as well: a longer match there is preferred. None: nothing is read of
            other requests.
    """

    name = "suffix"
    depends_on = "the prefix; with a cache also what other requests have emitted"
    start = (1.9, -1.0)  # 0.27, 0.58, 0.79, 0.95 for 1, 2, 4, 8 tokens: greedy answers of a 1.5B model

    def __init__(self, cache: SuffixCache | None = None) -> None:
        self.cache = cache

    def run(self, tokens: Tokens, most: int) -> tuple[Tokens, NDArray[np.float64]]:
        """As :meth:`RunSource.run`; a run that comes to the last token goes on as a loop, another request's ends with
        what that has emitted."""
        start, match = longest_match(tokens)
        if self.cache is not None and match < MAX_MATCH:
            text = self.cache.text
            there, longer = longest_match(tokens, text)
            if longer > match:
                run = text[there : there + most]
                ends = np.flatnonzero(run < 0)
                run = run[: ends[0]] if len(ends) else run
                return run, x_of(longer, len(run))
        if not match:
            return tokens[:0], np.empty(0)
        return np.resize(tokens[start:], most), x_of(match, most)


def x_of(match: int, length: int) -> NDArray[np.float64]:
    """[length] what the chance of each candidate behind a match is estimated from."""
    x: NDArray[np.float64] = np.log(match + np.arange(length, dtype=np.float64))
    return x


def longest_match(tokens: Tokens, text: Tokens | None = None) -> tuple[int, int]:
    """The longest earlier occurrence of the last tokens, of equals the latest.

    Args:
        tokens: [num_tokens] of a request.
        text: where they are looked for; a negative token ends a text in it, and nothing is found that has none behind
            it. None: in ``tokens`` itself.

    Returns:
        Where it goes on, and how many tokens match, at most :data:`MAX_MATCH`; 0, 0 if not even the last one does.
    """
    last = len(tokens) - 1
    own = text is None
    text = tokens if text is None else text
    end = len(text) - 1
    if last < own or end < 1:
        return 0, 0
    recent = max(end - 4 * LATEST, 0)
    ends = recent + np.flatnonzero(text[recent:end] == tokens[last])
    if recent and len(ends) < LATEST:  # else texts of few different tokens would take long
        ends = np.flatnonzero(text[:end] == tokens[last])
    if not own:
        ends = ends[text[ends + 1] >= 0]
    if not len(ends):
        return 0, 0
    latest = int(ends[-1]) + 1
    if latest >= MAX_MATCH and np.array_equal(text[latest - MAX_MATCH : latest], tokens[last + 1 - MAX_MATCH :]):
        return latest, MAX_MATCH
    ends = ends[-LATEST:]
    for back in range(1, min(NARROW, last + 1)):
        if len(ends) <= PLACES:
            break
        longer = ends[np.searchsorted(ends, back) :]
        longer = longer[np.flatnonzero(text[longer - back] == tokens[last - back])]
        if not len(longer):
            break
        ends = longer
    ends = ends[-PLACES:]
    before = np.arange(min(MAX_MATCH, last + (not own)))
    places = ends[:, None] - before  # [num_places, num_before]
    differ = np.ones((len(ends), len(before) + 1), dtype=np.bool_)
    differ[:, :-1] = (text[np.maximum(places, 0)] != tokens[last - before]) | (places < 0)
    lengths = differ.argmax(axis=1)  # [num_places]
    best = len(lengths) - 1 - int(lengths[::-1].argmax())
    return int(ends[best]) + 1, int(lengths[best])
