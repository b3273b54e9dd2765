# SPDX-License-Identifier: Apache-2.0
"""Counters of verified rounds."""

from __future__ import annotations

import pytest

from vllm_specdecpp.engine.shared.round_log import RoundLog


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
    last = {"request_id": "a", "candidates": [8], "accepted": 1, "next_token": 3, "drafted": 1}
    assert log.rounds(clear=True)[-1] == last
    assert log.rounds() == []


def test_no_trace_unless_asked_for():
    assert _filled(0).rounds() == []


def test_resize_keeps_what_fits():
    log = _filled(8)
    log.resize(1)
    assert [r["candidates"] for r in log.rounds()] == [[8]]


class _Clock:
    """Tells the seconds it was wound to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_step_is_timed():
    clock = _Clock()
    log = RoundLog(clock=clock)
    log.draft_pass()  # of no step, as in a warm-up
    found = []
    for start, end, passes in ((10.0, 10.5, 3), (12.0, 12.0, 0)):
        clock.now = start
        with log.step() as step:
            for _ in range(passes):
                log.draft_pass()
            clock.now = end
        log.stats(reset=True)
        found.append(step)
    assert found == [
        {"passes": 3, "draft_seconds": 0.5, "since_last_seconds": None},
        {"passes": 0, "draft_seconds": 0.0, "since_last_seconds": 1.5},
    ]


@pytest.mark.asks(17)
def test_candidates_in_vain_raise_an_alarm_once_until_one_is_accepted(caplog):
    log = RoundLog()
    for accepted in (0, 0, 0, 1, 0, 0):
        for _ in range(300):
            log.verified("a", [1, 2, 3, 4], accepted, 9)
    assert sum("was accepted" in record.message for record in caplog.records) == 2


def test_an_engine_made_later_takes_the_metrics_over():
    """As vLLM's own; prometheus refuses a name that is there."""
    from prometheus_client import REGISTRY

    from vllm_specdecpp.engine.metrics import EngineMetrics

    EngineMetrics("first", [0])
    EngineMetrics("second", [0])
    models = {sample.labels["model_name"] for metric in REGISTRY.collect() for sample in metric.samples
              if metric.name == "vllm:specdecpp_draft_passes"}  # fmt: skip
    assert models == {"second"}
