# SPDX-License-Identifier: Apache-2.0
"""A benchmark's methods, as written on the command line, and their order."""

from __future__ import annotations

import pytest

from benchmarks.common.methods import parse_method, parse_methods, rotated


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("off", "off"),
        ("draft_model:4", "draft_model:K=4"),
        ("draft_model:K=4", "draft_model:K=4"),
        ("confidence", "confidence"),
        ("confidence:num_speculative_tokens=12,threshold=0.60", "confidence:threshold=0.6,num_speculative_tokens=12"),
        ("fixed:num_speculative_tokens=4", "fixed:num_speculative_tokens=4"),
    ],
)
def test_a_method_is_read_and_written_canonically(text: str, label: str) -> None:
    assert parse_method(text).label == label
    assert parse_method(label) == parse_method(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("draft_model", "needs its K"),
        ("draft_model:0", "needs its K"),
        ("draft_model:k=4", "unknown option 'k'"),
        ("off:K=4", "unknown option 'K'"),
        ("confidence:treshold=0.6", "takes threshold"),
        ("confidence:threshold=high", "is not a float"),
        ("confidence:threshold=0.5,threshold=0.6", "given twice"),
        ("confidence:", "write name"),
        ("", "write name"),
    ],
)
def test_a_bad_method_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_method(text)


def test_a_method_may_be_named_once_only() -> None:
    with pytest.raises(ValueError, match="draft_model:K=4' is given twice"):
        parse_methods(["draft_model:4", "off", "draft_model:K=4"])


def test_rotation_gives_each_method_each_place_once() -> None:
    methods = parse_methods(["off", "draft_model:2", "confidence"])
    orders = [rotated(methods, turn) for turn in range(3)]
    assert all({order[place] for order in orders} == set(methods) for place in range(3))
