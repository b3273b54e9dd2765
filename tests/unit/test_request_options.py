# SPDX-License-Identifier: Apache-2.0
"""What one request may say: spellings over both interfaces, and the texts of the refusals."""

from __future__ import annotations

import pytest

from vllm_specdecpp.request_options import RequestOptions


def read(value):
    return RequestOptions.from_extra_args({"specdecpp": value})


@pytest.mark.parametrize("extra_args", [None, {}, {"other": {"enabled": False}}, {"specdecpp": None}])
def test_silence_changes_nothing(extra_args):
    assert RequestOptions.from_extra_args(extra_args) == RequestOptions()
    assert RequestOptions().bound(20) == 20


@pytest.mark.parametrize("value", [{"enabled": False}, '{"enabled": false}', "off", " OFF ", False, "false", 0])
def test_switched_off(value):
    assert read(value).bound(20) == 0


@pytest.mark.parametrize("value", [{"enabled": True}, "on", True, 1, {}, "{}"])
def test_switched_on(value):
    assert read(value).bound(20) == 20


@pytest.mark.parametrize("value", [{"num_speculative_tokens": 4}, '{"num_speculative_tokens": 4}'])
def test_capped(value):
    assert read(value).bound(20) == 4
    assert read(value).bound(2) == 2  # never more than the engine's own


def test_zero_drafts_nothing():
    assert (
        read({"num_speculative_tokens": 0}).bound(20)
        == read({"enabled": True, "num_speculative_tokens": 0}).bound(20)
        == 0
    )


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("maybe", ["'maybe'", "on or off"]),
        ([4], ["[4]", "must be an object"]),
        ({"num_speculative_token": 4}, ["num_speculative_token'", "did you mean 'num_speculative_tokens'"]),
        ({"zzz": 4}, ["'zzz'", "it takes enabled, num_speculative_tokens"]),
        ({"num_speculative_tokens": -1}, ["num_speculative_tokens=-1", "0 or more"]),
        (4, ["=4 must be an object", "num_speculative_tokens"]),
        (2.5, ["2.5", "must be an object"]),
        ({"num_speculative_tokens": "4"}, ["num_speculative_tokens='4'", "whole number"]),
        ({"enabled": 1}, ["enabled=1", "true or false"]),
    ],
)
def test_refusals_are_one_line(value, parts):
    with pytest.raises(ValueError) as raised:
        read(value)
    text = str(raised.value)
    assert "\n" not in text and text.startswith("specdecpp: ")
    for part in parts:
        assert part in text
