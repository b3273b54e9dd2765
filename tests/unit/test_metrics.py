# SPDX-License-Identifier: Apache-2.0
"""Counters of verified rounds."""

from __future__ import annotations

from vllm_specdecpp.engine.metrics import RoundLog


def _filled(trace_rounds: int) -> RoundLog:
    log = RoundLog(trace_rounds)
    for _ in range(4):
        log.draft_pass()
    log.verified("a", [5, 6, 7], accepted=2, next_token=9)
    log.verified("b", [], accepted=0, next_token=4)
    log.verified("a", [8], accepted=1, next_token=3)
    return log


def test_counters():
    assert _filled(0).stats() == {
        "rounds": 3, "candidates": 4, "accepted": 3, "draft_passes": 4, "emitted": 6, "lengths": {0: 1, 1: 1, 3: 1},
    }  # fmt: skip


def test_reset_starts_from_zero_and_keeps_the_trace():
    log = _filled(8)
    log.stats(reset=True)
    assert log.stats()["rounds"] == log.stats()["draft_passes"] == 0
    assert log.stats()["lengths"] == {}
    assert len(log.rounds()) == 3


def test_trace_keeps_the_last_rounds_only():
    log = _filled(2)
    assert [r["request_id"] for r in log.rounds()] == ["b", "a"]
    assert log.rounds(clear=True)[-1] == {"request_id": "a", "candidates": [8], "accepted": 1, "next_token": 3}
    assert log.rounds() == []


def test_no_trace_unless_asked_for():
    assert _filled(0).rounds() == []


def test_resize_keeps_what_fits():
    log = _filled(8)
    log.resize(1)
    assert [r["candidates"] for r in log.rounds()] == [[8]]
