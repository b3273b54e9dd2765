# SPDX-License-Identifier: Apache-2.0
"""Losslessness of the decision core, by exact enumeration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from tests.decision_rules import HIDDEN, RULES, all_rules
from vllm_specdecpp.decision.features import StepFeatures, features_from_logits
from vllm_specdecpp.decision.round import DraftRound, Rows
from vllm_specdecpp.decision.rules import FixedRule


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# A target and a draft with one token of memory over three outcomes, and everything that a round can do, enumerated.

VOCAB, K_MAX = 3, 3
TARGET = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.3, 0.65, 0.05]], dtype=torch.float64)  # p(next | last)
DRAFT = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.1, 0.8], [0.34, 0.33, 0.33]], dtype=torch.float64)  # q(next | last)
STATES = torch.tensor([[1.0, 0, 0.5, 0], [0, 1, 0, -0.5], [-1, 0, 1, 0.3]])  # the draft's hidden state after a token
ENUMERATION_TOLERANCE = 1e-12  # float64 sums of a few hundred terms
NUM_EMITTED = 4  # how many tokens of the emitted text are compared: at least two rounds

DRAWS = torch.tensor(list(itertools.product(range(VOCAB), repeat=K_MAX)))  # [27, K_MAX] every Y_1..Y_3
MakeRound = Callable[[int], DraftRound]
Law = dict[tuple[int, ...], float]


def draft_round(state: DraftRound, prefix: int, draft: Tensor) -> Tensor:
    """Runs one round per row of DRAWS after the token ``prefix``; returns the candidate lengths: [27]."""
    last = torch.full((len(DRAWS),), prefix)
    step = 0
    while state.goes_on():
        # The pass that has read Y_{k-1}.
        features = features_from_logits(draft[last].log(), STATES[last])
        state.observe(features)
        state.append(DRAWS[:, step])
        last = DRAWS[:, step]
        step += 1
    return state.lengths


def emitted_law(make_round: MakeRound, draft: Tensor = DRAFT, start: int = 0) -> Law:
    """The exact law of the first tokens emitted after ``start``, with standard rejection sampling."""

    @cache
    def rounds(prefix: int) -> tuple[tuple[tuple[int, ...], float], ...]:
        """What one round emits, and how likely."""
        out: Law = {}
        lengths = draft_round(make_round(len(DRAWS)), prefix, draft).tolist()
        for draws, length in zip(DRAWS.tolist(), lengths, strict=True):
            path = [prefix, *draws]
            weight = math.prod(draft[a, b].item() for a, b in itertools.pairwise(path))
            if weight == 0:
                continue
            reached = 1.0  # P(all candidates so far are accepted | draws)
            for k in range(1, length + 1):
                p, q = TARGET[path[k - 1]], draft[path[k - 1]]
                accept = min(1.0, (p[path[k]] / q[path[k]]).item())
                recovered = (p - q).clamp_min(0)
                for token in range(VOCAB):
                    if accept < 1:
                        share = reached * (1 - accept) * (recovered[token] / recovered.sum()).item()
                        key = (*path[1:k], token)
                        out[key] = out.get(key, 0.0) + weight * share
                reached *= accept
            for token in range(VOCAB):  # the bonus token
                key = (*path[1 : length + 1], token)
                out[key] = out.get(key, 0.0) + weight * reached * TARGET[path[length], token].item()
        return tuple(out.items())

    @cache
    def law(prefix: int, num_tokens: int) -> tuple[tuple[tuple[int, ...], float], ...]:
        if num_tokens <= 0:
            return (((), 1.0),)
        out: Law = {}
        for emitted, weight in rounds(prefix):
            for rest, share in law(emitted[-1], num_tokens - len(emitted)):
                key = (emitted + rest)[:num_tokens]
                out[key] = out.get(key, 0.0) + weight * share
        return tuple(out.items())

    return dict(law(start, NUM_EMITTED))


def largest_error(law: Law, start: int = 0) -> float:
    """Against the target's own law."""
    assert sum(law.values()) == pytest.approx(1, abs=ENUMERATION_TOLERANCE)
    errors = []
    for text in itertools.product(range(VOCAB), repeat=NUM_EMITTED):
        exact = math.prod(TARGET[a, b].item() for a, b in itertools.pairwise([start, *text]))
        errors.append(abs(law.get(text, 0.0) - exact))
    return max(errors)


class DropsUnlikelyTokens(DraftRound):
    """Planted bias: a drawn token is not submitted when its own draft probability is low."""

    def __init__(self, num_reqs: int, draft: Tensor) -> None:
        super().__init__(FixedRule(), torch.full((num_reqs,), K_MAX))
        self.draft = draft
        self.last: Tensor | None = None

    def observe(self, features: StepFeatures, rows: Rows = slice(None)) -> None:
        super().observe(features, rows)
        assert features.hidden_states is not None
        self.last = (features.hidden_states[:, None] == STATES).all(-1).long().argmax(-1)  # [num_reqs] the token read

    def append(self, token_ids: Tensor, rows: Rows = slice(None)) -> Tensor:
        dropped = self.running.bool() & (self.draft[self.last, token_ids] < 0.5)  # [num_reqs]
        column = super().append(token_ids, rows)
        self.lengths -= dropped.int()
        self.running[dropped] = 0
        return column


class LooksAtTheDrawnToken(DraftRound):
    """Planted bias: the likely first token stops the draft before it, so only unlikely ones are verified."""

    def append(self, token_ids: Tensor, rows: Rows = slice(None)) -> Tensor:
        column = super().append(token_ids, rows)
        dropped = (token_ids == 0) & (self.lengths == 1)  # [num_reqs]
        self.lengths[dropped] = self.running[dropped] = 0
        return column


class TestLossless:
    @pytest.mark.parametrize("index", range(5), ids=RULES)
    @pytest.mark.parametrize(("h", "start"), [(0.3, 0), (0.5, 1), (0.6, 2), (0.8, 0)])
    @pytest.mark.parametrize("min_length", [1, 2])
    @pytest.mark.parametrize("eos", [None, 1])
    def test_the_emitted_law_is_the_targets(
        self, index: int, h: float, min_length: int, eos: int | None, start: int
    ) -> None:
        def make_round(num_reqs: int) -> DraftRound:
            return DraftRound(
                all_rules(h)[index],
                torch.full((num_reqs,), K_MAX),
                min_length=min_length,
                stop_token_ids=None if eos is None else torch.tensor([eos]),
            )

        assert largest_error(emitted_law(make_round, start=start), start) < ENUMERATION_TOLERANCE

    @pytest.mark.parametrize("index", range(1, 5), ids=RULES[1:])
    def test_the_enumeration_sees_different_lengths(self, index: int) -> None:
        """Else the law would prove nothing about the rule."""
        seen: set[int] = set()
        for h in (0.3, 0.5, 0.6, 0.8):
            for prefix in range(VOCAB):
                state = DraftRound(all_rules(h)[index], torch.full((len(DRAWS),), K_MAX))
                seen |= set(draft_round(state, prefix, DRAFT).tolist())
        assert seen == ({2, 3} if index == 1 else {1, 2, 3})

    def test_dropping_a_token_for_its_own_value_is_caught(self) -> None:
        law = emitted_law(lambda num_reqs: DropsUnlikelyTokens(num_reqs, DRAFT))
        assert largest_error(law) > 0.01

    def test_stopping_before_a_token_for_its_own_value_is_caught(self) -> None:
        law = emitted_law(lambda num_reqs: LooksAtTheDrawnToken(FixedRule(), torch.full((num_reqs,), K_MAX)))
        assert largest_error(law) > 0.01

    def test_with_one_hot_drafting_even_dropping_is_exact(self) -> None:
        """A greedy draft's token is a function of the prefix, so it carries no information of its own."""
        one_hot = torch.nn.functional.one_hot(DRAFT.argmax(-1), VOCAB).double()
        law = emitted_law(lambda num_reqs: DropsUnlikelyTokens(num_reqs, one_hot), draft=one_hot)
        assert largest_error(law) < ENUMERATION_TOLERANCE

    @pytest.mark.parametrize("index", range(5), ids=RULES)
    @pytest.mark.parametrize("step", range(6))
    def test_the_decision_ignores_the_tokens_it_is_about(self, index: int, step: int) -> None:
        """Whether candidate k+1 is drawn is the same whatever Y_k is; its features come from Y_{k-1} and before."""
        num_reqs, num_steps = 32, 6
        logits = torch.randn(num_steps, num_reqs, 9) * 5
        hidden = torch.randn(num_steps, num_reqs, HIDDEN)

        def decisions(tokens: Tensor) -> list[list[bool]]:
            state = DraftRound(all_rules()[index], torch.full((num_reqs,), num_steps))
            out = []
            for k in range(step + 1):
                state.observe(features_from_logits(logits[k], hidden[k]))
                state.append(tokens[k])
                out.append(state.running.bool().tolist())
            return out

        tokens = torch.randint(0, 9, (num_steps, num_reqs))
        other = tokens.clone()
        other[step] = (other[step] + 1 + torch.randint(0, 8, (num_reqs,))) % 9
        assert decisions(tokens) == decisions(other)
