# SPDX-License-Identifier: Apache-2.0
"""Free runs on V2: those that V1 takes, in rounds that draft and rounds that do not; and the draft's KV behind them."""

from __future__ import annotations

import pytest

from tests.v2.cost_rounds import late_copies
from tests.v2.run_rounds import RunsPlay, with_runs


@pytest.mark.parametrize(("late", "books"), [(0, False), (1, False), (2, True)])
def test_runs_are_those_of_v1_and_drafts_right_behind_them(tiny, monkeypatch, late, books):
    """As requests join, are read in chunks, share cached blocks, are preempted, leave; the host learns late."""
    late_copies(monkeypatch, late)
    config, speculator, rule = with_runs(tiny, seed=late)
    play = RunsPlay(speculator, config, seed=30 + late, books=books, caches=True)
    play.run(num_steps=60)
    assert min(play.kinds.values()) >= 5, play.kinds
    assert play.num_left_out >= 5 and play.num_caught_up >= 5
    assert len(rule.plans) - 1 - late <= len(rule.told) == play.num_checked
    known = rule.free_runs
    assert known.candidates["suffix"] > known.accepted["suffix"] > 0
