# SPDX-License-Identifier: Apache-2.0
"""Text repeats itself: what followed the last time that the same tokens stood there, may follow again."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.integer[Any]]

MAX_MATCH = 64
"""Tokens compared at most: longer matches are no surer."""
LATEST, PLACES, NARROW = 2048, 32, 8
"""Of the latest 2048 places where the last token stands, if more than 32: those where up to 8 tokens match, and of
these the latest."""


class SuffixSource:
    """The run behind the longest earlier occurrence of the request's last tokens, in its own prompt and output.

    No index is kept: the tokens are searched anew in each round, so nothing can be stale after a preemption or a prefix
    hit, nothing is held between rounds, and nothing is read of other requests. 32,768 tokens take some 80 to 100
    microseconds (``benchmarks.simulate.overhead --runs``).

    The chance of a candidate is estimated from the logarithm of how many tokens match before it: those found, and the
    candidates of the run before it.
    """

    name = "suffix"
    depends_on = "the prefix"
    start = (1.9, -1.0)  # 0.27, 0.58, 0.79, 0.95 for 1, 2, 4, 8 tokens: greedy answers of a 1.5B model

    def run(self, tokens: Tokens, most: int) -> tuple[Tokens, NDArray[np.float64]]:
        """As :meth:`RunSource.run`; a run that comes to the last token goes on as a loop."""
        start, match = longest_match(tokens)
        if not match:
            return tokens[:0], np.empty(0)
        return np.resize(tokens[start:], most), x_of(match, most)


def x_of(match: int, length: int) -> NDArray[np.float64]:
    """[length] what the chance of each candidate behind a match is estimated from."""
    x: NDArray[np.float64] = np.log(match + np.arange(length, dtype=np.float64))
    return x


def longest_match(tokens: Tokens) -> tuple[int, int]:
    """The longest earlier occurrence of the last tokens, of equals the latest.

    Returns:
        Where it goes on, and how many tokens match, at most :data:`MAX_MATCH`; 0, 0 if not even the last one does.
    """
    last = len(tokens) - 1
    if last < 1:
        return 0, 0
    recent = max(last - 4 * LATEST, 0)
    ends = recent + np.flatnonzero(tokens[recent:last] == tokens[last])
    if recent and len(ends) < LATEST:  # else texts of few different tokens would take long
        ends = np.flatnonzero(tokens[:last] == tokens[last])
    if not len(ends):
        return 0, 0
    latest = int(ends[-1]) + 1
    if latest >= MAX_MATCH and np.array_equal(tokens[latest - MAX_MATCH : latest], tokens[last + 1 - MAX_MATCH :]):
        return latest, MAX_MATCH
    ends = ends[-LATEST:]
    for back in range(1, NARROW):
        if len(ends) <= PLACES:
            break
        longer = ends[np.searchsorted(ends, back) :]
        longer = longer[np.flatnonzero(tokens[longer - back] == tokens[last - back])]
        if not len(longer):
            break
        ends = longer
    ends = ends[-PLACES:]
    before = np.arange(min(MAX_MATCH, last))
    places = ends[:, None] - before  # [num_places, num_before]
    differ = np.ones((len(ends), len(before) + 1), dtype=np.bool_)
    differ[:, :-1] = (tokens[places] != tokens[last - before]) | (places < 0)
    lengths = differ.argmax(axis=1)  # [num_places]
    best = len(lengths) - 1 - int(lengths[::-1].argmax())
    return int(ends[best]) + 1, int(lengths[best])
