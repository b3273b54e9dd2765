# SPDX-License-Identifier: Apache-2.0
"""What the host reckons with while a device looks for runs (``tests/v2/kernels`` tests what the device takes)."""

from __future__ import annotations

import numpy as np

from vllm_specdecpp.costs.model import CostModel
from vllm_specdecpp.decision.cost_aware import CostAwareRule
from vllm_specdecpp.decision.cost_aware.admission import Standing
from vllm_specdecpp.decision.sources.suffix import SuffixSource

MOST = 7
CURVES = {"first": {1: 20e-3}, "step": {1: 20e-3}, "verify": {1: 20e-3, 6: 21e-3, 7: 30e-3, 64: 60e-3}}


def make_rule(**curves: dict[int, float]) -> CostAwareRule:
    costs = CostModel(**(CURVES | curves), max_reqs=64, max_tokens=64)
    return CostAwareRule(costs, MOST, sources=[SuffixSource()])


def test_who_has_runs_that_pay_does_not_draft_though_nobody_sees_them() -> None:
    """The plan goes by the last reported round; a request that is new promises nothing."""
    rule = make_rule(first={1: 1e-3}, step={1: 1e-3})
    rule.admission.records.update(["a", "b"], [100.0, 100.0], [60.0, 60.0])  # drafting is worth its passes
    batch = [Standing(name, 6, 50, 0, 10) for name in ("a", "b")]
    assert rule.begin(batch, None).drafts.all()
    rule.free_runs.reported(["a", "b"], np.array([30, 0]), np.array([5, 0]), np.array([4.9, 0.0]))
    round_ = rule.begin(batch, None)
    assert round_.drafts.tolist() == [False, True]
    assert not round_.free.lengths.any()  # what is taken is yet to be reported
    short = rule.free_runs.promised(["a", "c"], np.array([2, 6]))
    assert short.lengths.tolist() == [2, 0] and short.accepted.tolist() == [2.0, 0.0]


def test_reported_runs_teach_the_source() -> None:
    rule = make_rule()
    rule.begin([Standing("a", 6, 50, 0, 10)], None)
    taken = rule.free_runs.reported(["a", "b"], np.array([3, 0]), np.array([4, 0]), np.array([2.0, 0.0]))
    before = rule.free_runs.models["suffix"].theta.copy()
    rule.free_runs.learn(["a", "b"], taken, [4, None], [2, 0])
    assert rule.free_runs.candidates == {"suffix": 4} and rule.free_runs.accepted == {"suffix": 2}
    assert (rule.free_runs.models["suffix"].theta != before).any()
    assert taken.without(np.array([True, False])).lengths.tolist() == [0, 0]
