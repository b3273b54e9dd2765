# SPDX-License-Identifier: Apache-2.0
"""The registry of stop rules: unknown names are errors, and a rule is one class and one entry."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from tests.toy_rule import Alternate, registered
from vllm_specdecpp.config import SpecDecPPConfig
from vllm_specdecpp.decision.from_options import make_rule
from vllm_specdecpp.decision.round import DraftRound
from vllm_specdecpp.decision.rules import NEVER, FixedRule, ThresholdRule, tail_threshold
from vllm_specdecpp.head.model import AcceptanceHead
from vllm_specdecpp.rule_registry import RULES, RuleEntry, register


def test_an_unknown_rule_is_an_error():
    names = ", ".join(map(repr, RULES))
    with pytest.raises(ValueError, match=f"rule='nonsense' must be one of {names}"):
        SpecDecPPConfig.from_additional_config({"model": "d", "rule": "nonsense"})


def test_every_entry_makes_its_rule_and_the_device_decides_as_it_says():
    head = AcceptanceHead(4)
    for entry in RULES.values():
        if entry.make is None:
            continue
        rule = entry.make(head, entry.threshold)
        assert rule.name == entry.name
        assert (rule.estimator is None) == (entry.estimator is None)
        assert tail_threshold(rule) == (NEVER if entry.threshold is None else entry.threshold)
    assert [name for name, entry in RULES.items() if entry.make is None] == ["cost_aware"] == list(RULES)[:1]


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="there is a rule 'fixed' already"):
        register(RuleEntry("fixed", "Never."))


def test_a_registered_rule_is_an_option(monkeypatch):
    registered(monkeypatch)
    config = SpecDecPPConfig.from_additional_config({"model": "d", "rule": "alternate"})
    rule = make_rule(config, None)
    assert rule.name == Alternate.name
    state = DraftRound(rule, torch.tensor([5, 1]))
    with pytest.raises(ValueError, match="threshold=0.5 has no meaning with rule='alternate'"):
        SpecDecPPConfig.from_additional_config({"model": "d", "rule": "alternate", "threshold": 0.5})
    for _ in range(2):
        state.observe(cast(Any, None))
        state.append(torch.zeros(2, dtype=torch.int64))
    assert state.lengths.tolist() == [2, 1] and not state.goes_on()
    assert RULES["alternate"].device_tail is False


@pytest.mark.parametrize("base", [FixedRule, ThresholdRule])
def test_a_subclass_with_logic_of_its_own_has_no_device_tail(base: Any) -> None:
    """Its entry may say otherwise: the kernel would never ask it."""

    members = {"name": "own", "threshold": 0.5, "should_stop": lambda self, survival, num_drawn: survival < 2}
    own = type("Own", (base,), {**members, "__init__": lambda self: None})()
    assert tail_threshold(own) is None
