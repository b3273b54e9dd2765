# SPDX-License-Identifier: Apache-2.0
"""Every draft of the V2 speculator, under a random scheduler, against an oracle that sees wrong indices."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.v2 import harness
from tests.v2.oracle import Stops
from tests.v2.play import Play

CASES: list[tuple[dict[str, Any], Stops]] = [
    ({"rule": "fixed", "num_speculative_tokens": 4}, Stops(2.0)),
    ({"rule": "fixed", "num_speculative_tokens": 1}, Stops(2.0)),
    ({"rule": "confidence", "threshold": 0.5, "num_speculative_tokens": 6}, Stops(0.5)),
    ({"rule": "confidence", "threshold": 0.15, "num_speculative_tokens": 6}, Stops(0.15)),
    ({"rule": "confidence", "threshold": 0.3, "num_speculative_tokens": 5, "min_speculative_tokens": 3}, Stops(0.3, 3)),
]


@pytest.mark.parametrize(
    ("case", "books"), [*((case, False) for case in range(len(CASES))), (2, True), (4, True)], ids=str
)
def test_drafts_equal_the_oracles(tiny, case, books):
    options, stops = CASES[case]
    config, speculator = harness.speculator(tiny, kernels=(case, books) == (4, True), **options)
    lengths = Play(speculator, config, stops, seed=case, books=books).run(num_steps=25)
    assert len(lengths) > 30
    assert 0 in lengths and len(set(lengths)) >= min(3, 1 + options["num_speculative_tokens"])
    assert max(lengths) == options["num_speculative_tokens"]


def test_probabilistic_drafts_of_greedy_requests_are_the_same(tiny):
    options, stops = CASES[2]
    config, speculator = harness.speculator(tiny, draft_sample_method="probabilistic", **options)
    assert len(Play(speculator, config, stops, seed=11).run(num_steps=20)) > 30


def test_rule_changes_between_rounds(tiny):
    config, speculator = harness.speculator(tiny, rule="fixed", num_speculative_tokens=5)
    play = Play(speculator, config, Stops(2.0), seed=3)
    play.run(num_steps=8)
    speculator.reconfigure({"rule": "confidence", "threshold": 0.45, "num_speculative_tokens": 4})
    play.stops = Stops(0.45)
    play.run(num_steps=8)
    speculator.reconfigure({"threshold": 0.12, "min_speculative_tokens": 2})
    play.stops = Stops(0.12, 2)
    assert len(play.run(num_steps=8)) > 40


def test_every_rank_drafts_what_rank_0_says(tiny, monkeypatch):
    """A rank whose own scores say "go on" stops with rank 0; what it would have drawn is replaced as well."""
    config, speculator = harness.speculator(tiny, rule="confidence", threshold=0.9, num_speculative_tokens=4)
    sent: list[tuple[int, ...]] = []

    class Rank1:
        def broadcast(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
            assert src == 0
            sent.append(tuple(tensor.shape))
            token_ids, scores = tensor  # one message a pass
            return torch.stack((token_ids, torch.zeros_like(scores)))  # the bits of 0.0

    monkeypatch.setattr("vllm_specdecpp.engine.shared.drafter.get_tp_group", Rank1)
    speculator._num_ranks = 2
    speculator.round.agree_drawn = speculator.agree
    always = Stops(threshold=-1.0)  # rank 0's scores are 0: no draft outlives its first candidate
    lengths = Play(speculator, config, always, seed=2).run(num_steps=20)
    assert set(lengths) == {0, 1}
    assert len(sent) >= 8
