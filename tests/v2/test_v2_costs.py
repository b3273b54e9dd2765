# SPDX-License-Identifier: Apache-2.0
"""How passes are timed at start-up on V2."""

from __future__ import annotations

from typing import Any


class _Captured:
    """In the place of captured rounds: a replay takes 3 s for its first pass, and 1 s for each further one."""

    sizes = [1, 4]

    def __init__(self, clock: Any, speculator: Any) -> None:
        self._clock, self._speculator = clock, speculator

    def replay(self, size: int, max_length: int) -> None:
        drafts = self._speculator.round.running[:size]
        assert drafts.tolist() == [1] * size and (self._speculator.idx_mapping == -1).all()
        room = self._speculator._tail.params.limits[:size]
        self._clock[0] += 2.0 + int(room.max())


def test_captured_rounds_are_timed_as_they_are_replayed(tiny, monkeypatch):
    from tests.v2 import harness
    from vllm_specdecpp.engine.v2 import timing as v2_start

    _, speculator = harness.speculator(tiny, rule="cost_aware", num_speculative_tokens=6)
    clock = [0.0]
    monkeypatch.setattr(v2_start.time, "perf_counter", lambda: clock[0])
    speculator.graphs = _Captured(clock, speculator)
    points = v2_start._captured(speculator, v2_start.V2Passes(speculator))
    assert points == {"first": {1: 3.0, 4: 3.0}, "step": {1: 1.0, 4: 1.0}}
