# SPDX-License-Identifier: Apache-2.0
"""One request's constraints teach nobody else: its outcomes never move what is expected of other requests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.unit.test_cost_aware_rule import paper_rule
from vllm_specdecpp.decision.cost_aware.admission import Standing
from vllm_specdecpp.decision.cost_aware.rule import CostAwareRule
from vllm_specdecpp.decision.sources import Run

X = np.linspace(-3.0, 5.0, 9)


class Toy:
    """A source."""

    name, start = "toy", (1.0, 0.0)


def serve(rule: CostAwareRule, num: int, accepted: float, *, constrained: bool, prefix: str) -> int:
    """Requests of 20 rounds each, two at a time, high scores all; returns the candidates."""
    rng, candidates = np.random.default_rng(1), 0
    for turn in range(num):
        names = [f"{prefix}{turn // 20}-{i}" for i in range(2)]
        batch = [Standing(name, 8, 10_000, 0, 1 + turn % 20, constrained=constrained) for name in names]
        runs = [[Run("toy", [1, 2], np.array([1.0, 1.0]))], []] if turn % 4 == 3 else [[], []]
        round_ = rule.begin(batch, runs)
        while round_.running.any():
            round_.step(np.full(2, 0.9))
        lengths = round_.submitted.tolist()
        candidates += sum(lengths)
        wins = [int(np.argmin(np.append(rng.random(n) < accepted, False))) for n in lengths]
        rule.finish(round_, lengths, wins, 0.023 * len(round_.widths), 0.109)
    return candidates


def expected(rule: CostAwareRule) -> np.ndarray:
    """What is expected of a request of which nothing is known."""
    model = rule.acceptance
    positions = range(1, 6)
    estimates = [model.accept(X, k) for k in positions] + [model.means[:5], model.next.theta[:6]]
    run = rule.free_runs.chances(Run("toy", [1, 2], np.array([1.0, 1.0])))
    mean, _ = rule.admission.records.of(["unknown"])
    return np.concatenate([*estimates, run, mean, [rule.admission.correction]])


@pytest.mark.parametrize("constrained", [True, False])
def test_a_stream_of_constrained_requests_moves_no_others_estimates(constrained: bool) -> None:
    """Unless they are not known to be constrained: the test's power."""
    rule = paper_rule(sources=[Toy()])
    serve(rule, 400, 0.9, constrained=False, prefix="plain")
    before = expected(rule)
    assert serve(rule, 400, 0.1, constrained=constrained, prefix="bound") > 100
    moved = np.abs(expected(rule) - before).max()
    assert moved <= 0.005 if constrained else moved > 0.1


def test_constrained_requests_are_judged_by_their_kind() -> None:
    rule = paper_rule(sources=[Toy()])
    serve(rule, 400, 0.9, constrained=False, prefix="plain")
    records = rule.admission.records
    assert records.of(["a"], np.array([True]))[0][0] == pytest.approx(records.mean)
    serve(rule, 400, 0.1, constrained=True, prefix="bound")
    poor, good = records.of(["a", "b"], np.array([True, False]))[0]
    assert poor < 0.3 < 0.8 < good


def test_where_all_requests_are_constrained_drafting_is_learnt_all_the_same() -> None:
    rule = paper_rule(sources=[Toy()])
    serve(rule, 200, 0.9, constrained=True, prefix="bound")
    assert serve(rule, 100, 0.9, constrained=True, prefix="more") > 400


@pytest.mark.parametrize("constrained", [True, False])
def test_constrained_requests_alone_have_a_calibration_of_their_own(constrained: bool) -> None:
    """Scores say 0.9 where 0.45 is true: without it drafting would be slower than off for good."""
    rule = paper_rule(sources=[Toy()])
    serve(rule, 400, 0.45, constrained=constrained, prefix="bound")
    model = rule.apart if constrained else rule.acceptance
    assert model.accept(np.array([2.2]), 1)[0] == pytest.approx(0.45, abs=0.12)
    assert rule.admission._correction(constrained) < 1.3


@pytest.mark.parametrize(
    ("params", "wanted"),
    [
        ({}, False),
        ({"temperature": 0.3, "top_p": 0.5, "seed": 1, "stop_token_ids": [5], "min_tokens": 3, "logprobs": 2}, False),
        ({"extra_args": {"specdecpp": {"num_speculative_tokens": 2}}}, False),
        ({"repetition_penalty": 1.1}, False),  # the server's own
        ({"repetition_penalty": 1.2}, True),
        ({"presence_penalty": 0.5}, True),
        ({"frequency_penalty": -0.5}, True),
        ({"allowed_token_ids": [3, 4]}, True),
        ({"bad_words": ["no"]}, True),
        ({"structured_outputs": SimpleNamespace(regex="a")}, True),
        ({"thinking_token_budget": 0}, True),
        ({"extra_args": {"ban": [3]}}, True),  # of a logits processor
        ({"extra_args": {"kv_transfer_params": {"do_remote_decode": True}}}, False),
    ],
)
def test_which_requests_are_constrained(params: dict[str, Any], wanted: bool) -> None:
    vllm = pytest.importorskip("vllm")
    from vllm_specdecpp.engine.shared.requests import is_constrained

    structured = params.pop("structured_outputs", None)
    made = vllm.SamplingParams(**params)
    made.structured_outputs = structured
    assert is_constrained(made, {"repetition_penalty": 1.1}) is wanted
