# SPDX-License-Identifier: Apache-2.0
"""Scalar features: the margin, and what a head reads of each."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vllm_specdecpp.decision.features import (
    SCALAR_FEATURES,
    StepFeatures,
    check_features,
    encode_scalars,
    features_from_logits,
    num_inputs,
)

TOLERANCE = 1e-5  # float32 against float64
LIMIT = 6.0  # no encoding leaves [-LIMIT, LIMIT]


class TestMargin:
    @pytest.mark.parametrize("vocab", [2, 3, 1000, 151_936])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_against_a_sort(self, vocab: int, dtype: torch.dtype) -> None:
        logits = (torch.randn(4, vocab, generator=torch.Generator().manual_seed(0)) * 5).to(dtype)
        margin = features_from_logits(logits).margin
        order = logits.double().sort(-1, descending=True).values
        assert margin is not None and margin.dtype == torch.float32
        torch.testing.assert_close(margin.double(), order[:, 0] - order[:, 1], atol=TOLERANCE, rtol=TOLERANCE)

    def test_ties_masked_and_single_logits(self) -> None:
        inf = math.inf
        margin = features_from_logits(torch.tensor([[3.0, 3, 1], [2, -inf, -inf], [-7, -9, -7.5]])).margin
        assert margin is not None and margin.tolist() == [0, inf, 0.5]
        single = features_from_logits(torch.tensor([[3.0]])).margin
        assert single is not None and single.tolist() == [inf]

    @pytest.mark.parametrize("others", [frozenset(), frozenset({"top1_prob", "entropy"})])
    def test_only_when_asked_for(self, others: frozenset[str]) -> None:
        logits = torch.randn(2, 5)
        assert features_from_logits(logits, needs=others).margin is None
        features = features_from_logits(logits, needs=others | {"margin"})
        assert features.margin is not None and (features.top1_prob is not None) is bool(others)


def columns(num_rows: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(num_rows, 50, generator=generator) * 4
    features = features_from_logits(logits)
    found = {"top1_prob": features.top1_prob, "entropy": features.entropy, "margin": features.margin}
    return {name: column for name, column in found.items() if column is not None}


class TestEncoding:
    def test_what_each_says(self) -> None:
        found = encode_scalars(columns(), SCALAR_FEATURES)
        p, h, m = (columns()[name].double() for name in SCALAR_FEATURES)
        expected = [(p / (1 - p)).log() / 4, p, h.log() / 4, (-h).exp(), (1 + m).log()]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), torch.stack(expected, -1), atol=TOLERANCE, rtol=1e-4)

    @pytest.mark.parametrize("names", [[], ["entropy"], ["margin", "top1_prob"], list(SCALAR_FEATURES)])
    def test_order_and_number_of_columns(self, names: list[str]) -> None:
        found = encode_scalars(columns(), names)
        assert found.shape == (7, num_inputs(names))
        parts = [encode_scalars(columns(), [name]) for name in names]
        assert torch.equal(found, torch.cat(parts, -1) if parts else found)

    def test_no_rows(self) -> None:
        assert encode_scalars(columns(0), SCALAR_FEATURES).shape == (0, num_inputs(SCALAR_FEATURES))

    @pytest.mark.parametrize("name", SCALAR_FEATURES)
    def test_bounded_and_monotonic(self, name: str) -> None:
        extremes = {
            "top1_prob": [0.0, 1e-30, 0.3, 0.9, 1 - 2**-24, 1.0],
            "entropy": [-1e-7, 0.0, 1e-30, 0.1, 3.0, 11.9],
            "margin": [0.0, 1e-3, 2.0, 40.0, 1e4, math.inf],
        }[name]
        found = encode_scalars({name: torch.tensor(extremes)}, [name])
        assert bool(found.isfinite().all()) and float(found.abs().max()) <= LIMIT
        steps = found.diff(dim=0) * torch.tensor([1.0, -1.0] if name == "entropy" else [1.0] * found.shape[1])
        assert bool((steps >= 0).all())

    def test_nan_stays_nan(self) -> None:
        for name in SCALAR_FEATURES:
            found = encode_scalars({name: torch.tensor([math.nan, 0.5])}, [name])
            assert found.isnan().tolist() == [[True] * found.shape[1], [False] * found.shape[1]]


class TestErrors:
    def test_a_missing_column(self) -> None:
        with pytest.raises(
            ValueError, match=r"^specdecpp: the head reads features.entropy, but there is no such column"
        ):
            encode_scalars({"top1_prob": torch.ones(2)}, ["top1_prob", "entropy"])

    @pytest.mark.parametrize(
        ("names", "lag", "message"),
        [
            (["top1"], 1, "features='top1' is unknown; choose among top1_prob, entropy, margin"),
            (["hidden_states"], 1, "features='hidden_states' is unknown"),
            (["margin", "margin"], 1, "features=margin,margin names one twice"),
            (["drawn_logprob"], 1, "features='drawn_logprob' is unknown"),
            (["margin"], 1, "features=margin with lag=1: such a head reads the hidden state alone; leave one"),
        ],
    )
    def test_names_that_cannot_be(self, names: list[str], lag: int, message: str) -> None:
        with pytest.raises(ValueError) as caught:
            check_features(names, lag)
        assert str(caught.value).startswith("specdecpp: ") and message in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_every_scalar_is_a_field(self) -> None:
        assert set(SCALAR_FEATURES) < set(StepFeatures.__dataclass_fields__)
        check_features(SCALAR_FEATURES, 0)
        check_features([], 1)
