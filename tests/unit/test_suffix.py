# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from vllm_specdecpp.decision import sources
from vllm_specdecpp.decision.sources.suffix import MAX_MATCH, SuffixSource, longest_match
from vllm_specdecpp.decision.sources.suffix_cache import END, SuffixCache
from vllm_specdecpp.source_registry import make_sources, register


def brute_force_in(tokens: np.ndarray, text: np.ndarray) -> tuple[int, int]:
    """Every place of another text that a token follows."""
    best = 0, 0
    for place in np.flatnonzero(text[1:] >= 0):
        match = 0
        while match < min(MAX_MATCH, len(tokens), place + 1) and text[place - match] == tokens[-1 - match]:
            match += 1
        if match and match >= best[1]:
            best = int(place) + 1, match
    return best


def brute_force(tokens: np.ndarray) -> tuple[int, int]:
    """Every place, compared token by token."""
    last, best = len(tokens) - 1, (0, 0)
    for place in range(last):
        match = 0
        while match < MAX_MATCH and match <= place and tokens[place - match] == tokens[last - match]:
            match += 1
        if match and match >= best[1]:
            best = place + 1, match
    return best


@pytest.mark.parametrize("seed", range(10))
def test_finds_the_longest_match_and_of_equals_the_latest(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(100):
        tokens = rng.integers(0, rng.integers(1, 6), rng.integers(0, 120))
        assert longest_match(tokens) == brute_force(tokens)
    many = rng.integers(0, 2, 1500)  # more places than are compared one by one
    assert longest_match(many)[1] == brute_force(many)[1]


@pytest.mark.parametrize("seed", range(5))
def test_finds_the_longest_match_in_what_others_have_emitted(seed: int) -> None:
    rng = np.random.default_rng(seed)
    found = 0
    for _ in range(100):
        part = rng.integers(0, 9, 90)
        pieces = [rng.integers(0, rng.integers(1, 9), rng.integers(0, 90)) for _ in range(3)]
        pieces.insert(int(rng.integers(0, 4)), np.append(part[rng.integers(0, 90) :], rng.integers(0, 9, 3)))
        text = np.concatenate([np.append(piece, END) for piece in pieces])
        tokens = np.append(rng.integers(0, 9, rng.integers(0, 20)), part)[-int(rng.integers(1, 100)) :]
        assert longest_match(tokens, text) == brute_force_in(tokens, text)
        found += longest_match(tokens, text)[1] > 20
    assert found > 10


def test_another_requests_output_is_taken_where_more_of_it_matches() -> None:
    cache = SuffixCache()
    source = SuffixSource(cache)
    own = np.array([1, 2, 3, 9, 1, 2, 3])
    cache.update({"a": np.array([1, 2, 3, 4, 5]), "b": np.array([9, 1, 2, 3, 7, 8])})
    assert source.run(own, 4)[0].tolist() == [7, 8], "four tokens match there, three in its own; no further than it is"
    assert np.exp(source.run(own, 4)[1]) == pytest.approx([4, 5])
    cache.update({"a": np.array([1, 2, 3, 4, 5])})
    assert source.run(own, 1)[0].tolist() == [7], "of a request that has left"
    for _ in range(3):
        cache.update({"a": np.array([1, 2, 3, 4, 5]), "b": np.array([9, 1, 2, 3, 7, 8])})
        cache.update({"a": np.array([1, 2, 3, 4, 5])})
    assert (cache.text == END).sum() == 2, "of one that came back and left again there is one copy"
    assert source.run(np.array([2, 3, 9, 2, 3]), 2)[0].tolist() == [9, 2], "of equals its own"
    assert longest_match(np.arange(60), np.array([58, 59, 4, END])) == (2, 2), "a text shorter than the request's own"
    assert source.run(np.array([5, 5, 8]), 3)[0].tolist() == [], "nothing follows"
    assert SuffixSource().run(np.array([9, 1, 2, 3]), 4)[0].tolist() == [], "without a cache nobody else's is read"


def test_what_is_held_is_bounded_and_the_oldest_goes_first() -> None:
    cache, rng = SuffixCache(size=100), np.random.default_rng(0)
    texts = {name: rng.integers(0, 99, 1 + 7 * name) for name in range(30)}
    for first in range(28):
        cache.update({str(name): texts[name][:27] for name in range(first, first + 3)})
        assert len(cache.text) <= 100
        latest = [cache.text[place - 1] for place in np.flatnonzero(cache.text == END)]
        assert latest[-1] == texts[first + 2][:27][-1]
    cache.update({"long": np.arange(1000), "short": np.array([7, 8])})
    live = [*range(951, 1000), END, 7, 8, END]
    assert cache.text[-53:].tolist() == live and 53 < len(cache.text) <= 100, "a long text leaves room for others"
    cache.update({})
    assert cache.text[-53:].tolist() == live, "of requests that have left"
    cache.update({"new": np.arange(60)})
    assert cache.text.tolist() == [*live[-3:], *range(60), END], "the oldest has gone"


def test_a_match_among_very_many_places_is_found() -> None:
    tokens = np.zeros(20_000, dtype=np.int32)
    tokens[15_000:15_010] = range(1, 11)
    tokens[-10:] = range(1, 11)
    assert longest_match(tokens) == (15_010, MAX_MATCH)
    assert longest_match(np.zeros(20_000, dtype=np.int32)) == (19_999, MAX_MATCH)


def test_runs_go_on_behind_the_match_and_as_a_loop_at_the_end() -> None:
    ids, x = SuffixSource().run(np.array([1, 2, 3, 4, 5, 1, 2]), 3)
    assert ids.tolist() == [3, 4, 5] and np.exp(x) == pytest.approx([2, 3, 4])
    assert SuffixSource().run(np.array([7, 8, 7, 8, 7]), 4)[0].tolist() == [8, 7, 8, 7]
    for nothing in ([1, 2, 3], [1], []):
        ids, x = SuffixSource().run(np.array(nothing, dtype=np.int32), 4)
        assert len(ids) == len(x) == 0


def test_proposes_by_name_and_leaves_out_what_is_empty() -> None:
    (source,) = make_sources(["suffix", "draft_model"])
    (run,) = sources.propose([source], np.array([5, 6, 5]), 2)
    assert (run.source, run.token_ids) == ("suffix", [6, 5])
    assert sources.propose([source], np.array([5, 6, 7]), 2) == []


def test_a_stop_token_ends_a_run() -> None:
    """What would follow could never be emitted."""
    tokens = np.array([5, 6, 2, 7, 5])
    for stops, expected in (([2, -1], [6, 2]), ([], [6, 2, 7]), ([9], [6, 2, 7])):
        (run,) = sources.propose([SuffixSource()], tokens, 3, stops)
        assert run.token_ids == expected and len(run.x) == len(expected)


@pytest.mark.parametrize("name", ["suffix", "draft_model"])
def test_a_name_is_taken_once(name: str) -> None:
    with pytest.raises(ValueError, match=f"^specdecpp: there is a source '{name}' already"):
        register(name, SuffixSource)
