# SPDX-License-Identifier: Apache-2.0
"""A rule without a device tail is refused on Model Runner V2, at start-up and later: the device never asks it."""

from __future__ import annotations

import pytest

from tests import engine_harness
from tests.toy_rule import registered
from tests.v2 import harness


def test_refused_at_start_up(tiny, monkeypatch):
    registered(monkeypatch)
    config = {"method": "specdecpp", "model": tiny.draft_good, "rule": "alternate"}
    with (
        pytest.raises(ValueError, match="^specdecpp: rule='alternate' has no device tail.*VLLM_USE_V2_MODEL_RUNNER=0"),
        engine_harness.engine(tiny.target, config),
    ):
        pass


def test_refused_while_it_runs_and_the_rule_before_stays(tiny, monkeypatch):
    registered(monkeypatch)
    _, speculator = harness.speculator(tiny, rule="confidence", threshold=0.25)
    with pytest.raises(ValueError, match="^specdecpp: rule='alternate' has no device tail"):
        speculator.reconfigure({"rule": "alternate"})
    assert speculator.round.rule.name == speculator.config.rule == "confidence"
    assert float(speculator.round.threshold) == 0.25
