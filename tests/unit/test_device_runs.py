# SPDX-License-Identifier: Apache-2.0
"""What a device takes of runs is what the rule takes on the host; and what the host reckons with meanwhile."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_specdecpp.costs.model import CostModel
from vllm_specdecpp.decision.cost_aware import CostAwareRule
from vllm_specdecpp.decision.cost_aware.admission import Standing
from vllm_specdecpp.decision.cost_aware.device_runs import RowsBefore, draft_seconds, take_rows
from vllm_specdecpp.decision.cost_aware.free_runs import Before
from vllm_specdecpp.decision.cost_aware.logistic import BUCKETS
from vllm_specdecpp.decision.sources import Run
from vllm_specdecpp.decision.sources.suffix import SuffixSource, x_of
from vllm_specdecpp.decision.tail_params import CostAwareParams

MOST = 7
CURVES = {"first": {1: 20e-3}, "step": {1: 20e-3}, "verify": {1: 20e-3, 6: 21e-3, 7: 30e-3, 64: 60e-3}}


def make_rule(**curves: dict[int, float]) -> CostAwareRule:
    costs = CostModel(**(CURVES | curves), max_reqs=64, max_tokens=64)
    return CostAwareRule(costs, MOST, sources=[SuffixSource()])


@pytest.mark.parametrize("seed", range(20))
def test_a_device_takes_what_the_host_takes(seed: int) -> None:
    """For batches of all sizes, also beyond the cost table, and with any chances."""
    rng = np.random.default_rng(seed)
    rule, num_reqs = make_rule(), int(rng.choice([1, 2, 5, 30, 60]))
    rule.free_runs.models["suffix"].theta += rng.normal(0, 0.5, len(rule.free_runs.models["suffix"].theta))
    matches = np.where(rng.random(num_reqs) < 0.7, rng.integers(1, 65, num_reqs), 0)
    limits = rng.integers(0, MOST + 1, num_reqs)
    params = CostAwareParams.allocate(60, MOST, 64, BUCKETS, "cpu")
    names = [str(i) for i in range(num_reqs)]
    rule.free_runs._own.update({name: tuple(rng.uniform(0, 20, 2)) for name in names[::2]})
    rule.begin([Standing(name, 5, 9, 0, 1) for name in names]).load(params)
    runs = [[Run("suffix", [1] * MOST, x_of(m, MOST))] if m else [] for m in matches.tolist()]
    wanted = rule.free_runs.take(names, runs, limits, rule.costs)
    found = take_rows(torch.from_numpy(matches), torch.from_numpy(limits).int(), MOST, params)
    assert found.lengths.tolist() == wanted.lengths.tolist()
    torch.testing.assert_close(found.accepted.double(), torch.from_numpy(wanted.accepted), rtol=1e-4, atol=1e-6)
    # Behind drafts as well.
    widths = -np.sort(-rng.integers(0, num_reqs + 1, MOST))
    seconds = rule.costs.draft_seconds([width for width in widths.tolist() if width])
    spent = draft_seconds(torch.from_numpy(widths).int(), params)
    assert float(spent) == pytest.approx(seconds, rel=1e-5)
    rows, tokens, survival = num_reqs + 9, num_reqs + rng.uniform(0, 9), rng.random(num_reqs).astype(np.float32)
    wanted = rule.free_runs.take(
        names, runs, limits, rule.costs, Before(rows, tokens, seconds, survival.astype(np.float64))
    )
    before = RowsBefore(torch.tensor(rows), torch.tensor(tokens).double(), spent, torch.from_numpy(survival))
    found = take_rows(torch.from_numpy(matches), torch.from_numpy(limits).int(), MOST, params, before)
    assert found.lengths.tolist() == wanted.lengths.tolist()
    torch.testing.assert_close(found.accepted.double(), torch.from_numpy(wanted.accepted), rtol=1e-4, atol=1e-6)
    chances = rule.free_runs.chances(Run("suffix", [1] * MOST, x_of(9, MOST)), names[0])
    alone = take_rows(torch.tensor([9]), torch.tensor([MOST - 1]), MOST, params).accept[0]
    torch.testing.assert_close(alone[:-1].double(), torch.from_numpy(chances[:-1]), rtol=1e-5, atol=0)
    assert alone[-1] == 0


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
