# SPDX-License-Identifier: Apache-2.0
"""Rounds for threshold_tail, and the comparison with decision/round.RoundState."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from vllm_specdecpp.decision.features import StepFeatures
from vllm_specdecpp.decision.round import RoundState
from vllm_specdecpp.decision.rules import ThresholdRule

VOCAB = 12  # small: stop tokens are drawn


@dataclass(frozen=True)
class Case:
    """One round's shape."""

    num_reqs: int
    max_length: int = 6
    num_stop: int = 2
    min_length: int = 1
    threshold: float = 0.55
    lag: int = 0
    nan: float = 0.1
    """Share of scores that are NaN; as many are beyond [0, 1]."""
    coarse: bool = False
    """Scores are multiples of 1/4, so that 1 - S meets the threshold."""
    limit: int | None = None
    """max_lengths are drawn up to this; None: up to ``max_length``."""

    def __str__(self) -> str:
        odd = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return ",".join(odd)


CASES = [
    Case(1, max_length=1),
    Case(1, num_stop=0),
    Case(2, lag=1, num_stop=1),
    Case(3, num_stop=5, threshold=0.9),
    Case(5, limit=0),
    Case(7, min_length=3, nan=0.3),
    Case(9, threshold=0.5, coarse=True),
    Case(33, max_length=9, threshold=0.99, num_stop=9),
    Case(64, nan=1.0),
    Case(255, lag=1),
    Case(257, max_length=3, num_stop=4),
    Case(520, max_length=2, num_stop=1),
]


class _Scores:
    """An estimator that says what it is told to."""

    name, needs = "told", frozenset({"top1_prob"})

    def __init__(self, lag: int) -> None:
        self.lag = lag

    def __call__(self, features: StepFeatures, position: int) -> Tensor:
        assert features.top1_prob is not None
        return features.top1_prob


def arguments(case: Case, seed: int = 0) -> dict[str, Any]:
    """Fresh tensors of a round, in the launcher's names; draft_tokens are rows of a wider buffer, all 99."""
    generator = torch.Generator().manual_seed(seed)
    n, top = case.num_reqs, case.max_length if case.limit is None else case.limit
    max_lengths = torch.randint(0, top + 1, (n,), generator=generator, dtype=torch.int32)
    stops = torch.randint(0, VOCAB, (n, case.num_stop), generator=generator)
    stops[torch.rand(n, case.num_stop, generator=generator) < 0.4] = -1
    return {
        "survival": torch.ones(n), "lengths": torch.zeros(n, dtype=torch.int32),
        "running": (max_lengths > 0).int(), "max_lengths": max_lengths, "min_length": case.min_length,
        "threshold": torch.tensor([case.threshold]), "stop_token_ids": stops,
        "draft_tokens": torch.full((n, case.max_length + 3), 99)[:, : case.max_length],
        "any_running": torch.full((1,), 7, dtype=torch.int32),
    }  # fmt: skip


def check_rounds(launch: Any, case: Case, seeds: int = 2) -> Tensor:
    """Run whole rounds by ``launch`` and by RoundState; after each step all must be equal. Returns the lengths."""
    lengths = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(100 + seed)
        a = arguments(case, seed)
        rule = ThresholdRule(_Scores(case.lag), case.threshold)
        state = RoundState(rule, a["max_lengths"], min_length=case.min_length, stop_token_ids=a["stop_token_ids"])
        drafts = torch.full((case.num_reqs, case.max_length), 99)
        for step in range(1, case.max_length + 1):  # also after all have stopped, as a graph without IF nodes does
            scores = _scores(case, generator)
            token_ids = torch.randint(-1, VOCAB, (case.num_reqs,), generator=generator)
            token_ids[state.running & (token_ids < 0)] = 0  # what is not running may hold anything
            drafts[:, step - 1] = torch.where(state.running, token_ids, -1)
            state.observe(StepFeatures(top1_prob=scores))
            state.append(token_ids)
            launch(scores.clone(), token_ids.clone(), step, **a, scored=not (case.lag and step == 1))
            where = f"{case} seed {seed} step {step}"
            assert torch.equal(a["survival"], state.survival), where
            assert torch.equal(a["lengths"].long(), state.lengths), where
            assert a["running"].tolist() == state.running.int().tolist(), where
            assert a["any_running"].tolist() == [int(state.any_running())], where
            assert torch.equal(a["draft_tokens"], drafts), where
        lengths.append(state.lengths)
    return torch.cat(lengths)


def _scores(case: Case, generator: torch.Generator) -> Tensor:
    scores = torch.rand(case.num_reqs, generator=generator) ** 0.4
    if case.coarse:
        scores = (scores * 4).ceil() / 4
    odd = torch.rand(case.num_reqs, generator=generator)
    scores[odd < case.nan] = torch.nan
    beyond = (odd >= case.nan) & (odd < 2 * case.nan)
    values = torch.tensor([-0.5, 1.5, torch.inf, -torch.inf, 0.0, 1.0])
    scores[beyond] = values[torch.randint(0, 6, (int(beyond.sum()),), generator=generator)]
    return scores
