# SPDX-License-Identifier: Apache-2.0
"""A stop rule as a newcomer would add it: one class, one registration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_specdecpp.decision.estimator import Estimator
from vllm_specdecpp.rule_registry import RULES, RuleEntry, register


class Alternate:
    """Drafts two candidates a round, whatever it knows."""

    name = "alternate"
    depends_on = "nothing"
    estimator: Estimator | None = None
    needs: frozenset[str] = frozenset()

    def should_stop(self, survival: Tensor, num_drawn: int) -> Tensor:
        return torch.full_like(survival, num_drawn >= 1, dtype=torch.bool)  # [num_reqs]


def registered(monkeypatch: Any) -> None:
    """Put the rule into the registry until the test ends."""
    monkeypatch.setitem(RULES, Alternate.name, None)  # so that it is taken out again
    del RULES[Alternate.name]
    register(RuleEntry(Alternate.name, "After two candidates.", lambda head, h: Alternate()))
