# SPDX-License-Identifier: Apache-2.0
"""The tails in torch against loops and the oracle, with planted bugs; and their parameters."""

from __future__ import annotations

import functools
import importlib.util
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from tests.v2.kernels import cost_aware_cases, threshold_cases
from vllm_specdecpp.decision import tails
from vllm_specdecpp.decision.tail_params import CostAwareParams


@pytest.mark.parametrize("case", threshold_cases.CASES, ids=str)
def test_threshold_tail_equals_a_loop(case: threshold_cases.Case) -> None:
    threshold_cases.check_rounds(tails.threshold_tail, case)


def test_the_cases_stop_for_every_reason() -> None:
    lengths = torch.cat([threshold_cases.check_rounds(tails.threshold_tail, case) for case in threshold_cases.CASES])
    assert set(lengths.tolist()) >= {0, 1, 2, 3, 4, 5}


@functools.cache
def met_in(case: cost_aware_cases.Case) -> Counter[str]:
    return cost_aware_cases.check_rounds(tails.cost_aware_tail, case)


@pytest.mark.parametrize("case", cost_aware_cases.CASES, ids=str)
def test_cost_aware_tail_equals_the_oracle(case: cost_aware_cases.Case) -> None:
    met = met_in(case)
    assert met["steps"] > 0 and met["steps"] >= 8 * met["fragile"]


def test_the_cases_meet_everything_there_is() -> None:
    met = sum(map(met_in, cost_aware_cases.CASES), Counter[str]())
    wanted = ("all go on", "some go on", "nobody goes on", "dropped", "last submitted")
    assert all(met[name] >= 5 for name in wanted), met


def test_at_price_0_all_is_drafted() -> None:
    cost_aware_cases.check_free(tails.cost_aware_tail)


def check_following(module: Any, seed: int) -> None:
    """Against the oracle's chain."""
    rng = np.random.default_rng(seed)
    round_ = cost_aware_cases.make_round(cost_aware_cases.Case(7, max_length=20), rng)
    round_.rule.acceptance.next.theta[0] = rng.uniform(0.2, 4)
    oracle, params = cost_aware_cases.oracle_of(round_), cost_aware_cases.load_params(round_)
    x = [*rng.uniform(-8, 8, 6).tolist(), None]
    given = torch.tensor([np.nan if value is None else value for value in x])
    for position in (0, 1, 3, 14, 20):
        got = module.following(given, position, 6, params)
        wanted = [oracle._following(value, position, 6, oracle.levels[i]) for i, value in enumerate(x)]
        np.testing.assert_allclose(got, wanted, rtol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_what_follows_is_the_oracles_chain(seed: int) -> None:
    check_following(tails, seed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"limits": [1] * 5}, "limits has room for 4, must have for 5"),
        ({"this": np.ones(4)}, "this has room for 4, must have for 5"),
        ({"means": np.ones(2)}, "means has room for 2, must have for 3"),
        ({"step_seconds": np.ones(4)}, "step_seconds has room for 4, must have for 5"),
        ({"verify_seconds": np.ones(9)}, "verify_seconds has 9 entries, must have 10; allocate with max_tokens=8"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(change, message) -> None:
    params = CostAwareParams.allocate(4, 2, 9, [0, 0, 1, 2], "cpu")
    given: dict[str, Any] = {
        "limits": [1, 2], "price": 2.0, "this": np.arange(5.0), "next": np.arange(1.0, 6.0), "means": np.ones(3),
        "step_seconds": np.ones(5), "verify_seconds": np.ones(10),
    }  # fmt: skip
    params.load(**given)
    assert params.limits.tolist() == [1, 2, 0, 0] and params.base.item() == 2 and params.price.item() == 2
    assert params.this.tolist() == [3, 3, 4, 5, 5, 5, 5, 5, 5, 5] and params.slopes.tolist() == [0, 1, 10]
    assert params.drift.tolist() == [20, 10, 10, 20, 20, 20, 20, 20, 20, 20]
    assert params.step_seconds.tolist() == [1] * 5 and params.verify_seconds.tolist() == [1] * 10
    with pytest.raises(ValueError, match=f"^specdecpp: CostAwareParams.load: {message}"):
        params.load(**given | change)
    with pytest.raises(ValueError, match="^specdecpp: CostAwareParams: max_length=0 must be 1 or more"):
        CostAwareParams.allocate(4, 0, 9, [0], "cpu")


def _mutant(old: str, new: str) -> ModuleType:
    """The module with ``old``, which stands in one place, replaced."""
    source = Path(tails.__file__).read_text()
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times"
    spec = importlib.util.spec_from_loader("mutant", loader=None)
    assert spec is not None
    module: Any = importlib.util.module_from_spec(spec)
    exec(compile(source.replace(old, new), "mutant", "exec"), module.__dict__)
    return module


def _check(module: Any) -> None:
    for drafted in threshold_cases.CASES[:9]:
        threshold_cases.check_rounds(module.threshold_tail, drafted)
    for seed in range(5):
        check_following(module, seed)
    cost_aware_cases.check_small(module.cost_aware_tail)


MUTATIONS = [
    ("nan=0.0)", "nan=1.0)"),
    ("clamp_(0, 1)", "clamp_(min=0)"),
    ("clamp_(0, 1)", "clamp_(max=1)"),
    ("torch.where(ran, survival * score, survival)", "survival * score"),
    ("    if scored:", "    if True:"),
    ("lengths += ran", "lengths += 1"),
    ("(lengths < max_lengths)", "(lengths <= max_lengths)"),
    ("if step >= min_length", "if step > min_length"),
    ("1 - survival > threshold", "1 - survival >= threshold"),
    ("step - lag, running", "step, running"),
    (".masked_fill_(rests, torch.nan)", ""),
    ("if position > 0:", "if True:"),
    (".masked_fill_(rests, 1.0)", ""),
    ("params.means[position])", "params.means[position - 1])"),
    ("HORIZON + lag, params)", "HORIZON + lag, params).roll(1, 1)"),
    ("reach * ahead[:, 0], ahead[:, 1:]", "reach, ahead[:, 1:]"),
    ("lengths.sum()))", "ran.sum()))"),
    ("params.limits[:num_reqs] - lengths", "params.limits[:num_reqs] - lengths + 1"),
    (".masked_fill_(more >= room[:, None], 0.0)", ""),
    (".masked_fill_(rests[:, None], -1.0)", ""),
    ("more * params.step_seconds", "params.step_seconds"),
    ("verify.take(num_running + counts * more)", "verify.take(counts * more)"),
    ("(seconds - verify.take(num_running))", "seconds"),
    ("(counts > num_running) | (", "("),
    (" | (more >= room.masked_fill(rests, 0).amax())", ""),
    (".flip(0).flatten()", ".flatten()"),
    ("num_reqs - best // HORIZON", "1 + best // HORIZON"),
    ("ran & (room > 1) & (gain", "ran & (gain"),
    (" & (gain.take(best) >= 0)", ""),
    ("(gain.take(best) >= 0)", "(gain.take(best) > 0)"),
    ("stops, submits = ran & ~chosen, ran", "stops, submits = ran & False, ran"),
    ("reach.masked_fill(~stops, -1.0)", "reach"),
    ("gain.masked_fill_(counts > stops.sum(), -torch.inf)", "pass"),
    ("verify.take(num_chosen + counts) - verify.take(num_chosen)", "verify.take(counts) - verify.take(counts[0] - 1)"),
    (".clamp_min_(0), 0).amax()", ", 0).amax()"),
    ("chosen | _first(order, num)", "chosen"),
    ("expected += reach * submits", "expected += reach"),
    ("lengths += submits", "lengths += ran"),
    ("carried.clamp_(-MAX_LOG_ODDS, MAX_LOG_ODDS)", "carried"),
    ("params.drift[at]", "params.drift[position]"),
    (".add_(levels))", ")"),
    ("[log_odds + levels]", "[log_odds]"),
    ("params.levels[: len(log_odds)]", "params.levels[:1]"),
    ("params.means[position + 1 : end + 1]", "params.means[position:end]"),
    ("index - beyond) + beyond * (table[-1] - table[-2])", "index - beyond)"),
    ("descending=True, stable=True", "descending=True"),
    ("places < num", "places <= num"),
    ("num.view(1) > 0", "num.view(1) >= 0"),
    ("token_ids.where(submits, -1)", "token_ids"),
    ("go_on = go_on & (stop_token_ids", "go_on = go_on | (stop_token_ids"),
    ("any_running.copy_(go_on.any())", "any_running.copy_(go_on.all())"),
]


@pytest.mark.parametrize(("old", "new"), MUTATIONS, ids=[f"{old} -> {new or 'nothing'}" for old, new in MUTATIONS])
def test_planted_bug_is_caught(old: str, new: str) -> None:
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        _check(_mutant(old, new))


def test_without_a_bug_all_is_well() -> None:
    _check(_mutant("clamp_(0, 1)", "clamp_(0, 1)"))
