# SPDX-License-Identifier: Apache-2.0
"""Rounds for threshold_tail, and the comparison with a loop over the requests."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

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


@dataclass
class Request:
    """One request's round, in float32 scalars."""

    limit: int
    stops: list[int]
    survival: Tensor = field(default_factory=lambda: torch.tensor(1.0))
    length: int = 0
    running: bool = False

    def step(self, case: Case, step: int, score: Tensor, token_id: int) -> None:
        """Survival of candidate ``step``, drawn as ``token_id``, and whether another one follows."""
        if not self.running:
            return
        if not (case.lag and step == 1):
            self.survival = self.survival * (torch.tensor(0.0) if score.isnan() else score.clamp(0, 1))
        self.length += 1
        last = step >= case.min_length and bool(1 - self.survival > torch.tensor(case.threshold))
        self.running = not last and token_id not in self.stops and self.length < self.limit


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
    """Run whole rounds by ``launch`` and request by request; after each step all must be equal. Returns the lengths."""
    lengths = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(100 + seed)
        a = arguments(case, seed)
        pairs = zip(a["max_lengths"].tolist(), a["stop_token_ids"].tolist(), strict=True)
        requests = [Request(limit, stops, running=limit > 0) for limit, stops in pairs]
        drafts = torch.full((case.num_reqs, case.max_length), 99)
        for step in range(1, case.max_length + 1):  # also after all have stopped, as a graph without IF nodes does
            scores = _scores(case, generator)
            token_ids = torch.randint(-1, VOCAB, (case.num_reqs,), generator=generator)
            running = torch.tensor([request.running for request in requests])
            token_ids[running & (token_ids < 0)] = 0  # what is not running may hold anything
            drafts[:, step - 1] = torch.where(running, token_ids, -1)
            for request, score, token_id in zip(requests, scores, token_ids.tolist(), strict=True):
                request.step(case, step, score, token_id)
            launch(scores.clone(), token_ids.clone(), step, **a, scored=not (case.lag and step == 1))
            where = f"{case} seed {seed} step {step}"
            assert torch.equal(a["survival"], torch.stack([request.survival for request in requests])), where
            assert a["lengths"].tolist() == [request.length for request in requests], where
            assert a["running"].tolist() == [request.running for request in requests], where
            assert a["any_running"].tolist() == [any(request.running for request in requests)], where
            assert torch.equal(a["draft_tokens"], drafts), where
        lengths.append(a["lengths"].clone())
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
