# SPDX-License-Identifier: Apache-2.0
"""Sequences out of a toy vocabulary follow the target's law under the live rule, and do not under one that peeks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from tests.standings import standings
from vllm_specdecpp.costs.model import CostModel
from vllm_specdecpp.decision.cost_aware.rule import CostAwareRule

VOCAB, LENGTH, BATCH = 3, 4, 8
rng_tables = np.random.default_rng(0)
TARGET = rng_tables.dirichlet(np.full(VOCAB, 1.5), VOCAB)  # [previous token, token]
DRAFT = 0.5 * TARGET + 0.5 * rng_tables.dirichlet(np.full(VOCAB, 1.0), VOCAB)
ACCEPT = np.minimum(TARGET, DRAFT).sum(axis=1)  # the best score there is: it depends on the previous token alone


def law() -> np.ndarray:
    """Probability of each sequence after token 0."""
    out = []
    for seq in itertools.product(range(VOCAB), repeat=LENGTH):
        out.append(np.prod([TARGET[a, b] for a, b in zip((0, *seq), seq, strict=False)]))
    return np.array(out)


def serve(num_batches: int, peek: bool, lag: int, seed: int) -> tuple[np.ndarray, set[int]]:
    """Counts of the sequences, and the candidate lengths that occurred."""
    rng = np.random.default_rng(seed)
    rule = CostAwareRule(CostModel({1: 0.004}, {1: 0.004}, {1: 0.02, 64: 0.12}, max_reqs=BATCH), 3, lag=lag)
    counts, seen = np.zeros(VOCAB**LENGTH), set()
    for batch in range(num_batches):
        texts = [[0] for _ in range(BATCH)]
        while min(map(len, texts)) <= LENGTH:
            ids = [f"{batch}-{i}" for i in range(BATCH)]
            # As a server would: no candidate beyond what the request may still emit.
            round_ = rule.begin(standings(ids, [max(0, LENGTH - len(t)) for t in texts]))
            drafts: list[list[int]] = [[] for _ in texts]
            scored = np.array([t[-1] for t in texts])  # the token that the score depends on
            before = scored.copy()
            while round_.running.any():
                lengths = round_.lengths.copy()
                round_.step(ACCEPT[before if lag else scored])
                before = scored.copy()
                for i in np.flatnonzero(round_.lengths > lengths):
                    token = int(rng.choice(VOCAB, p=DRAFT[scored[i]]))
                    if peek and DRAFT[scored[i], token] < 0.4:
                        round_.lengths[i] -= 1  # drops a drawn token for its own value
                        round_.running[i] = False
                        continue
                    drafts[i].append(token)
                    scored[i] = token
            wins = []
            for text, draft in zip(texts, drafts, strict=True):
                wins.append(verify(text, draft, rng))
                seen.add(len(draft))
            rule.finish(round_, [len(d) for d in drafts], wins, 0.004 * len(round_.widths), 0.05)
        for text in texts:
            counts[int("".join(map(str, text[1 : LENGTH + 1])), VOCAB)] += 1
    return counts, seen


def verify(text: list[int], draft: list[int], rng: np.random.Generator) -> int:
    """Rejection sampling; appends the accepted tokens and one more. Returns how many were accepted."""
    for k, token in enumerate(draft):
        p, q = TARGET[text[-1]], DRAFT[text[-1]]
        if rng.random() >= p[token] / q[token]:
            rest = np.maximum(p - q, 0)
            text.append(int(rng.choice(VOCAB, p=rest / rest.sum())))
            return k
        text.append(token)
    text.append(int(rng.choice(VOCAB, p=TARGET[text[-1]])))
    return len(draft)


def p_value(counts: np.ndarray) -> float:
    expected = law() * counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    half_freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half_freedom, torch.tensor(statistic / 2, dtype=torch.float64)))


@pytest.mark.parametrize("lag", [0, 1])
def test_the_live_rule_is_lossless(lag):
    counts, seen = serve(250, peek=False, lag=lag, seed=1)
    assert len(seen) >= 3  # lengths did vary
    assert p_value(counts) > 1e-3


def test_the_test_sees_a_rule_that_peeks():
    counts, _ = serve(250, peek=True, lag=0, seed=1)
    assert p_value(counts) < 1e-6
