# SPDX-License-Identifier: Apache-2.0
"""Prices on V2: a round's first pass is paid whether anybody drafts or not; and how passes are timed at start-up."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from vllm_specdecpp.decision.cost_aware import CostAwareRule, CostModel

CURVES: dict[str, Any] = {"first": {1: 4.0, 8: 6.0}, "step": {1: 1.0, 8: 1.5}, "verify": {1: 10.0, 64: 20.0}}
SIZES: dict[str, Any] = {"max_reqs": 8, "max_tokens": 64}


def _models(num_reqs: int) -> tuple[Any, CostModel]:
    """Ours, and a plain one whose verification has the first pass in it."""
    from vllm_specdecpp.engine.v2_costs import FirstPassAlways

    model = FirstPassAlways(**CURVES, **SIZES)
    first = model.of_batch(num_reqs)
    verify = {width: seconds + first for width, seconds in CURVES["verify"].items()}
    return model, CostModel(first={1: 1e-12}, step=CURVES["step"], verify=verify, **SIZES)


@pytest.mark.parametrize("num_reqs", [1, 3, 8])
def test_the_first_pass_is_no_price_of_drafting(num_reqs):
    model, plain = _models(num_reqs)
    n = num_reqs
    rounds: list[tuple[list[int], int]] = [([], n), ([n], 2 * n), ([n, 1, 1], 20), ([2], 70)]
    for widths, tokens in rounds:
        assert model.round_seconds(widths, tokens) == pytest.approx(plain.round_seconds(widths, tokens))
    np.testing.assert_allclose(model.fixed_seconds(num_reqs, 5), plain.fixed_seconds(num_reqs, 5))
    passes = np.array([num_reqs, 1, 0])
    np.testing.assert_allclose(model.capped_seconds(num_reqs, passes), plain.capped_seconds(num_reqs, passes))
    np.testing.assert_allclose(np.diff(model.verify.table()[1:]), np.diff(plain.verify.table()[1:]))
    step, verify = model.tables(12, 80)
    assert (len(step), len(verify)) == (13, 81)
    np.testing.assert_allclose(np.diff(verify), np.diff(model.verify.many(np.arange(81))))
    assert model.points() == CostModel(**CURVES, **SIZES).points()  # what is shown and kept is what was measured


def test_a_rule_drafts_where_the_passes_after_the_first_pay():
    """With the first pass as a price of drafting nobody would; it is run anyway."""
    from vllm_specdecpp.engine.v2_costs import FirstPassAlways

    curves: dict[str, Any] = {"first": {1: 30.0}, "step": {1: 1.0}, "verify": {1: 10.0, 64: 11.0}}
    for kind, drafts in ((FirstPassAlways, True), (CostModel, False)):
        costs = kind(**curves, **SIZES)
        if isinstance(costs, FirstPassAlways):
            costs.of_batch(2)
        rule = CostAwareRule(costs, 6)
        assert rule.begin(["a", "b"], [6, 6]).drafts.any() == drafts


def test_each_part_learns_from_its_own_time():
    """The first pass of the whole batch, whoever drafts; the further ones; the rest, without the first pass in it."""
    model, _ = _models(4)
    before = {name: dict(curve) for name, curve in model.points().items()}
    for widths in itertools.islice(itertools.cycle([[2], [], [2, 2], [4, 1, 1]]), 600):
        first = model.of_batch(4)
        seconds = 1.2 * before_first(before) + 0.7 * sum(before["step"][1] + (w - 1) / 14 for w in widths[1:])
        model.observe(widths, seconds, 4 + sum(widths), first + 1.1 * (10.0 + 10.0 * (3 + sum(widths)) / 63))
    now = model.points()
    assert model.of_batch(4) / before_first(before) == pytest.approx(1.2, rel=0.05)
    assert now["step"][2] / (before["step"][1] + 1 / 14) == pytest.approx(0.7, rel=0.1)
    assert model.verify.curve.at(8) / (10 + 70 / 63) == pytest.approx(1.1, rel=0.02)


def before_first(points: dict[str, dict[int, float]]) -> float:
    """Of four requests, by the line between one and eight."""
    return points["first"][1] + 3 / 7 * (points["first"][8] - points["first"][1])


def test_what_was_not_timed_is_added_below_the_first_pass():
    model, _ = _models(2)
    first = model.of_batch(2)
    model.verify = model.verify.raised(3.0)
    assert model.verify.at(1) == pytest.approx(13.0 + first)
    assert model.points()["verify"][1] == pytest.approx(13.0)
    model.observe([2], 5.0, 4, first + 14.0)
    assert model.points()["first"] != CURVES["first"]


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
    from vllm_specdecpp.engine import v2_start

    _, speculator = harness.speculator(tiny, rule="cost_aware", num_speculative_tokens=6)
    clock = [0.0]
    monkeypatch.setattr(v2_start.time, "perf_counter", lambda: clock[0])
    speculator.graphs = _Captured(clock, speculator)
    points = v2_start._captured(speculator, v2_start.V2Passes(speculator), lambda tensor: tensor)
    assert points == {"first": {1: 3.0, 4: 3.0}, "step": {1: 1.0, 4: 1.0}}
