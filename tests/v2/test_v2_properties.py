# SPDX-License-Identifier: Apache-2.0
"""Whatever the mix of requests, the scheduler's events and the rule: each draft is the oracle's, which sees what is in
every slot of the draft's KV cache. Model Runner V2; ``tests/engine/test_properties.py`` has V1's."""

from __future__ import annotations

from typing import Any

import pytest

from tests.v2 import harness
from tests.v2.cost_rounds import ScriptedPlay, scripted
from tests.v2.oracle import Stops
from tests.v2.play import Play

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CASES: dict[str, Any] = {
    "seed": st.integers(0, 10_000), "threshold": st.sampled_from([None, 0.2, 0.45, 0.8, "cost_aware"]),
    "least": st.integers(1, 3), "books": st.booleans(), "caches": st.booleans(),
    "caps": st.lists(st.none() | st.integers(0, 6), min_size=1, max_size=4),
    "most_tokens": st.sampled_from([40, 64, 256]), "joins": st.sampled_from([0.1, 0.4, 0.9]),
}  # fmt: skip
SETTINGS = settings(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))


def _play(tiny: Any, num_steps: int, seed: int, threshold: Any, least: int, books: bool, caches: bool, caps: Any,
          most_tokens: int, joins: float) -> Play:  # fmt: skip
    if threshold == "cost_aware":
        config, speculator, _ = scripted(tiny, seed=seed)
        play: Play = ScriptedPlay(speculator, config, seed=seed, books=books, caches=caches)
    else:
        rule: dict[str, Any] = (
            {"rule": "fixed"} if threshold is None else {"rule": "confidence", "threshold": threshold}
        )
        config, speculator = harness.speculator(tiny, min_speculative_tokens=least, **rule)
        stops = Stops(2.0 if threshold is None else threshold, least)
        play = Play(speculator, config, stops, seed=seed, books=books, caches=caches)
        play.caps = caps
    speculator.max_num_tokens = most_tokens
    play.joins = joins
    play.run(num_steps)
    return play


@settings(SETTINGS, max_examples=12)
@given(**CASES)
def test_any_mix_is_drafted_right(tiny, **case):
    _play(tiny, 12, **case)


@pytest.mark.slow
@settings(SETTINGS, max_examples=400, derandomize=False)
@given(**CASES)
def test_any_of_hundreds_of_mixes_is_drafted_right(tiny, **case):
    _play(tiny, 40, **case)
