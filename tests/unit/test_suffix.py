# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from vllm_specdecpp.decision import sources
from vllm_specdecpp.decision.sources.suffix import MAX_MATCH, SuffixSource, longest_match
from vllm_specdecpp.source_registry import make_sources, register


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


def test_a_match_among_very_many_places_is_found() -> None:
    tokens = np.zeros(20_000, dtype=np.int32)
    tokens[15_000:15_010] = range(1, 11)
    tokens[-10:] = range(1, 11)
    assert longest_match(tokens) == (15_010, 14) or longest_match(tokens)[0] == 15_010
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
