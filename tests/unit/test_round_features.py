# SPDX-License-Identifier: Apache-2.0
"""Which scalars and which position reach an estimator: against one request at a time, with planted bugs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_specdecpp.decision.estimator import HeadEstimator
from vllm_specdecpp.decision.features import SCALAR_FEATURES, StepFeatures, encode_scalars
from vllm_specdecpp.decision.round import DraftRound, Rows
from vllm_specdecpp.decision.rules import ThresholdRule
from vllm_specdecpp.head.files import Calibration
from vllm_specdecpp.head.model import AcceptanceHead

NUM_REQS, NUM_STEPS, HIDDEN = 40, 9, 3
TOLERANCE = 1e-5  # batched and single-row matrix products differ in the last float32 digits
Data = dict[str, Tensor]


@pytest.fixture(scope="module")
def data() -> Data:
    """Everything a round could see: each [num_reqs, num_steps], hidden states [num_reqs, num_steps, hidden_size]."""
    generator = torch.Generator().manual_seed(5)
    found = {name: torch.rand(NUM_REQS, NUM_STEPS, generator=generator) for name in SCALAR_FEATURES}
    found["hidden_states"] = torch.randn(NUM_REQS, NUM_STEPS, HIDDEN, generator=generator)
    found["max_lengths"] = torch.randint(0, NUM_STEPS + 1, (NUM_REQS,), generator=generator)
    return found


def make_head(lag: int) -> AcceptanceHead:
    """One whose output depends strongly on every scalar that it may read, and on the position."""
    head = AcceptanceHead(HIDDEN, 1, features=() if lag else SCALAR_FEATURES, lag=lag)
    generator = torch.Generator().manual_seed(lag)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.7, generator=generator)
    head.calibration = Calibration(slope=0.7, intercepts=[2.5, 0.5, 3.0, 0.0, 2.0])
    return head.eval()


@torch.no_grad()
def one_by_one(head: AcceptanceHead, data: Data, h: float) -> tuple[list[int], list[float]]:
    """Lengths and survival of every request on its own, indexing ``data`` directly."""
    lengths, survivals = [], []
    for row, limit in enumerate(data["max_lengths"].tolist()):
        survival, length = 1.0, 0
        for k in range(limit):  # the pass that yields candidate k + 1
            scored = k - head.lag  # 0-based candidate that is scored
            if scored >= 0:
                names = head.features
                scalars = encode_scalars({name: data[name][row, k : k + 1] for name in names}, names) if names else None
                hidden = data["hidden_states"][row, k : k + 1]
                intercepts = [2.5, 0.5, 3.0, 0.0, 2.0]
                shift = intercepts[min(scored, 4)]
                survival *= 1 / (1 + math.exp(-(0.7 * float(head.logit(hidden, scalars)) + shift)))
            length = k + 1
            if 1 - survival > h:
                break
        lengths.append(length)
        survivals.append(survival)
    return lengths, survivals


def batched(
    head: AcceptanceHead, data: Data, h: float, which: str, make_state: Callable[..., DraftRound] = DraftRound
) -> tuple[list[int], list[float]]:
    """The same through ``DraftRound``; ``which`` says what of the batch the features describe."""
    state = make_state(ThresholdRule(HeadEstimator(head), h), data["max_lengths"])
    generator = torch.Generator().manual_seed(7)
    step = 0
    while state.goes_on():
        rows: Rows = slice(None)
        if which == "running":
            rows = state.running.nonzero().squeeze(1)
        elif which == "shuffled superset":
            extra = torch.rand(NUM_REQS, generator=generator) < 0.3
            chosen = (state.running.bool() | extra).nonzero().squeeze(1)
            rows = chosen[torch.randperm(len(chosen), generator=generator)]
        index: Any = rows
        now: dict[str, Any] = {name: data[name][index, step] for name in (*SCALAR_FEATURES, "hidden_states")}
        state.observe(StepFeatures(**now), rows)
        state.append(torch.zeros(NUM_REQS, dtype=torch.int64)[index], rows)
        step += 1
    return state.lengths.tolist(), state.survival.tolist()


WHICH = ["all", "running", "shuffled superset"]


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("h", [0.3, 0.6, 0.9, 0.999])
def test_equals_one_request_at_a_time(data: Data, lag: int, which: str, h: float) -> None:
    head = make_head(lag)
    lengths, survivals = batched(head, data, h, which)
    expected_lengths, expected = one_by_one(head, data, h)
    assert lengths == expected_lengths
    assert survivals == pytest.approx(expected, abs=TOLERANCE)
    if h == 0.9:
        assert len(set(lengths)) >= 5  # the comparison saw many lengths


class IgnoresRows(DraftRound):
    """Planted: the scores are filed in the order of ``rows``, not under its requests."""

    def observe(self, features: StepFeatures, rows: Rows = slice(None)) -> None:
        super().observe(features, rows)
        found = self.scores[rows].clone()
        self.scores[: len(found)] = found


class OffByOne(DraftRound):
    """Planted: the position is the number of passes."""

    def observe(self, features: StepFeatures, rows: Rows = slice(None)) -> None:
        estimator: Any = self.rule.estimator
        original = type(estimator).__call__

        def shifted(features: StepFeatures, position: int) -> Tensor:
            return original(estimator, features, position + 1)

        rule: Any = self.rule
        self.rule = _Rule(rule, shifted, estimator)  # type: ignore[assignment]
        super().observe(features, rows)
        self.rule = rule


class _Rule:
    def __init__(self, rule: Any, call: Any, estimator: Any) -> None:
        self.rule, self.should_stop = rule, rule.should_stop
        self.estimator = _Estimator(call, estimator)


class _Estimator:
    def __init__(self, call: Any, estimator: Any) -> None:
        self.call, self.lag = call, estimator.lag

    def __call__(self, features: StepFeatures, position: int) -> Tensor:
        return self.call(features, position)


@pytest.mark.parametrize(
    ("bug", "lag", "which"),
    [
        (IgnoresRows, 0, "running"), (IgnoresRows, 1, "shuffled superset"),
        (OffByOne, 0, "all"), (OffByOne, 1, "running"),
    ],
)  # fmt: skip
def test_a_planted_bug_is_seen(data: Data, bug: type[DraftRound], lag: int, which: str) -> None:
    head = make_head(lag)
    _, survivals = batched(head, data, 0.9, which, bug)
    assert survivals != pytest.approx(one_by_one(head, data, 0.9)[1], abs=100 * TOLERANCE)


def test_a_scalar_that_was_not_computed_is_asked_for_by_name() -> None:
    rule = ThresholdRule(HeadEstimator(AcceptanceHead(HIDDEN, features=["margin"], lag=0)), 0.5)
    with pytest.raises(ValueError, match=r"reads features.margin, but the draft step did not compute it"):
        DraftRound(rule, torch.tensor([4])).observe(StepFeatures(torch.zeros(1, HIDDEN)))
