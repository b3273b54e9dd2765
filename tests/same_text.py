# SPDX-License-Identifier: Apache-2.0
"""Requests with seeds of their own, answered at candidate lengths that chance decides, as the clock does in service."""

from __future__ import annotations

import random
from typing import Any

from tests import engine_harness as harness

KINDS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "logprobs": 2},
    {"temperature": 0.8, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "min_tokens": 8},
    {"temperature": 1.2, "bad_words": [], "allowed_token_ids": list(range(3, 300))},
    {"temperature": 0.9, "top_p": 0.8},
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": None},
]
"""The last one has no seed: it shares the batches, and its text may differ."""

Answer = tuple[list[int], list[dict[int, float]]]


def config(tiny: Any, draft_sample_method: str, **more: Any) -> dict[str, Any]:
    return {
        "method": "specdecpp", "model": tiny.draft_good, "rule": "fixed", "num_speculative_tokens": 5,
        "draft_sample_method": draft_sample_method, "trace_rounds": 100_000, **more,
    }  # fmt: skip


def answers(llm: Any, times: int = 3, max_tokens: int = 20) -> list[Answer]:
    """Token ids and logprobs of all kinds of requests, several times over, that have a seed or no temperature."""
    from vllm import SamplingParams

    common: dict[str, Any] = {"max_tokens": max_tokens, "detokenize": False}
    kinds = times * KINDS
    params = [SamplingParams(**common | {"seed": 100 + index} | kind) for index, kind in enumerate(kinds)]
    prompts: Any = [{"prompt_token_ids": p} for p in harness.prompts(len(kinds), seed=31, longest=10)]
    completions = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
    return [
        (list(c.token_ids), [{t: round(e.logprob, 3) for t, e in at.items()} for at in c.logprobs or ()])
        for c, kind in zip(completions, kinds, strict=True)
        if "seed" not in kind
    ]


def random_lengths(monkeypatch: Any, drafter: Any, seed: int) -> None:
    """Bound each request anew in each round, on either runner."""
    chance = random.Random(seed)
    if hasattr(drafter.requests, "max_length"):
        original = drafter.requests.max_length
        shorter = lambda *args: chance.randint(0, original(*args))  # noqa: E731
        monkeypatch.setattr(drafter.requests, "max_length", shorter)
        return
    table = drafter.requests.table

    def shortened(*args: Any) -> Any:
        rows = table(*args)
        rows[:, 0] = [chance.randint(0, int(most)) for most in rows[:, 0]]
        return rows

    monkeypatch.setattr(drafter.requests, "table", shortened)


def check_used(rounds: list[dict[str, Any]]) -> None:
    """What was drafted differed in length, and candidates were accepted and rejected."""
    assert {len(r["candidates"]) for r in rounds} >= {0, 1, 2, 3}
    candidates, accepted = sum(len(r["candidates"]) for r in rounds), sum(r["accepted"] for r in rounds)
    assert 0.1 < accepted / candidates < 0.95
