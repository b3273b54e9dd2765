# SPDX-License-Identifier: Apache-2.0
"""Changing the options while the engine runs: what both runners' drafters do alike, shown on a V2 speculator."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.v2 import harness


def test_a_bound_above_the_start_up_value_changes_nothing(tiny):
    _, speculator = harness.speculator(tiny, rule="confidence", threshold=0.4, num_speculative_tokens=4)
    before = speculator.config, speculator.round.rule
    with pytest.raises(ValueError, match="num_speculative_tokens=5 exceeds the 4 given at start-up"):
        speculator.reconfigure({"num_speculative_tokens": 5})
    assert before == (speculator.config, speculator.round.rule)


def test_what_a_change_puts_in_force(tiny):
    _, speculator = harness.speculator(tiny, rule="confidence", threshold=0.4, num_speculative_tokens=4)
    graphs: Any = SimpleNamespace()
    speculator.graphs = graphs
    speculator.reconfigure({"num_speculative_tokens": 3, "trace_rounds": 2, "threshold": 0.6})
    assert speculator.config.num_speculative_tokens == 3 and speculator.round.threshold.item() == pytest.approx(0.6)
    assert speculator.graphs is graphs  # the threshold is read from a buffer
    for _ in range(4):
        speculator.log.verified("a", [], 0, 1)
    assert len(speculator.log.rounds()) == 2
    speculator.reconfigure({"min_speculative_tokens": 2})
    assert speculator.graphs is None and speculator.round.min_length == 2
    assert speculator.reconfigure({"rule": "fixed"}).resolved_rule == speculator.round.rule.name == "fixed"


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_ranks_take_what_rank_0_sends(tiny, monkeypatch, dtype):
    """Not every backend can send bools, so none is sent; what comes back is of the type that was given."""
    _, speculator = harness.speculator(tiny, rule="fixed", num_speculative_tokens=4)
    sent = []

    class Rank1:
        def broadcast(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
            sent.append((tensor.dtype, src))
            return torch.ones_like(tensor)

    monkeypatch.setattr("vllm_specdecpp.engine.shared.drafter.get_tp_group", Rank1)
    mine = torch.zeros(3, dtype=dtype)
    assert speculator.agree(mine) is mine and not sent  # a single rank
    speculator._num_ranks = 2
    told = speculator.agree(mine)
    assert told.dtype == dtype and bool(told.all())
    assert sent == [(torch.uint8 if dtype == torch.bool else dtype, 0)]
