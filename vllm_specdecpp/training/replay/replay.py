# SPDX-License-Identifier: Apache-2.0
"""Replays recorded rounds under any stop rule: what it would have drafted, and how long that would have taken.

Every start of the chains is scored once, by the rule's own estimator; which lengths follow, and walking the chains with
them, is arithmetic. A rule meets the recorded features of a start's steps in order, as in the engine, and never an
outcome; how exact that is: see :mod:`vllm_specdecpp.training.replay.chains`.

Every policy emits the same tokens, so tokens per second differ by the seconds alone. Prefill is left out.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_specdecpp.costs.model import CostModel
from vllm_specdecpp.decision.estimator import ConfidenceEstimator
from vllm_specdecpp.decision.features import StepFeatures
from vllm_specdecpp.decision.rules import ThresholdRule
from vllm_specdecpp.head.model import AcceptanceHead
from vllm_specdecpp.rule_registry import RULES
from vllm_specdecpp.training.replay.chains import Chains

CUT_RATE_WARNING = 0.02
"""Above this share of rounds that outrun the record, the rounds should be recorded with more candidates."""


@dataclass(frozen=True)
class Lengths:
    """What a policy drafts at every start."""

    candidates: Tensor
    """[num_starts] int64 candidate length L."""

    cut: Tensor
    """[num_starts] bool: the record ended first, so L is a lower bound."""

    passes: Tensor | None = None
    """[num_starts] int64 draft passes, where they may be more than L: a pass whose candidate is not submitted."""


@dataclass(frozen=True)
class Walk:
    """Totals of the rounds that a policy runs through, by prompt: [num_prompts] float64 each."""

    tokens: Tensor
    rounds: Tensor
    candidates: Tensor
    accepted: Tensor
    seconds: Tensor
    cut: Tensor
    """Rounds whose length the record cut."""

    def tokens_per_second(self, chosen: Tensor | None = None) -> float:
        """Of the chosen prompts ([num_prompts] bool), or of all."""
        index = slice(None) if chosen is None else chosen
        return float(self.tokens[index].sum() / self.seconds[index].sum())

    def rates(self, chosen: Tensor | None = None) -> dict[str, float]:
        """The paper's verification rate N_target/N and discard rate N_discarded/N (arXiv:2405.19715, section 3),
        and the mean candidate length, the acceptance, and the share of cut rounds."""
        index = slice(None) if chosen is None else chosen
        tokens, rounds, candidates, accepted, cut = (
            float(x[index].sum()) for x in (self.tokens, self.rounds, self.candidates, self.accepted, self.cut)
        )
        return {
            "verification_rate": rounds / tokens,
            "discard_rate": (candidates - accepted) / tokens,
            "mean_candidate_length": candidates / rounds,
            "acceptance": accepted / candidates if candidates else 0.0,
            "cut_rate": cut / rounds,
        }


class RecordedEstimator:
    """An estimator at recorded steps: what it is given as ``hidden_states`` [num_rows, 1] are their indices.

    A head's logits were computed once a step, and its calibration, which depends on the position in the policy's own
    round, is applied here: it stands in for :class:`HeadEstimator`, and the tests compare the two.

    Args:
        rule: one with estimates (``rule_registry.RULES``); the cost-aware one reads those of one of the others.
        chains: loaded with ``head`` for a rule that needs one.
    """

    needs = frozenset({"hidden_states"})

    def __init__(self, rule: str, chains: Chains, head: AcceptanceHead | None) -> None:
        entry = RULES[rule]
        assert entry.estimator is not None
        self._chains, self._head = chains, head if entry.needs_head else None
        self._estimator = entry.estimator(self._head)
        self.name, self.lag = self._estimator.name, self._estimator.lag

    def __call__(self, features: StepFeatures, position: int) -> Tensor:
        assert features.hidden_states is not None
        steps = features.hidden_states[:, 0]
        if self._head is not None and self._chains.head_logits is not None:
            return self._head.calibrated(self._chains.head_logits[steps], position)
        scalars: dict[str, Any] = {name: self._chains.scalars[name][steps] for name in self._estimator.needs}
        return self._estimator(StepFeatures(**scalars), position)


def at(steps: Tensor) -> StepFeatures:
    """What a :class:`RecordedEstimator` reads of steps [num_rows]."""
    return StepFeatures(hidden_states=steps[:, None])


def scores(chains: Chains, estimator: RecordedEstimator, max_length: int) -> Tensor:
    """The score that the pass after k candidates gives: [num_starts, max_length] float32.

    NaN beyond the record, and where a lagged estimator has nothing to score yet.
    """
    found = torch.full((chains.num_starts, max_length), torch.nan)
    for k in range(estimator.lag, max_length):
        rows = (chains.available > k).nonzero().squeeze(1)  # [num_rows]
        if len(rows):
            found[rows, k] = estimator(at(chains.first_step[rows] + k), k + 1 - estimator.lag).float()
    return found


def survivals(chains: Chains, estimator: RecordedEstimator, max_length: int) -> Tensor:
    """Survival before each candidate if drafting never stopped: [num_starts, max_length] float32."""
    passes = torch.arange(max_length)
    scored = (passes >= estimator.lag) & (passes < chains.available[:, None])  # [num_starts, max_length]
    # A broken score, a NaN, counts as 0, as in the engine.
    found = scores(chains, estimator, max_length).nan_to_num(nan=0.0).clamp(0, 1)
    factors = torch.where(scored, found, 1.0)
    # Not cumprod, which multiplies in float64: the engine does not.
    return torch.stack(list(itertools.accumulate(factors.unbind(1), torch.mul)), dim=1)


def threshold_lengths(chains: Chains, survival: Tensor, threshold: float, max_length: int) -> Lengths:
    """The paper's rule at one threshold, from survivals computed once; the tests compare it with :class:`DraftRound`.

    Args:
        survival: [num_starts, n] with n >= max_length, from :func:`survivals`.
    """
    rule = ThresholdRule(ConfidenceEstimator(), threshold)  # its estimator has done its work already
    bound = chains.available.clamp(max=max_length)
    lengths = bound.clone()  # [num_starts]
    stopped = torch.zeros_like(chains.limited)
    for k in reversed(range(max_length)):
        stop = rule.should_stop(survival[:, k], k) & (k < bound)
        lengths = torch.where(stop, k + 1, lengths)
        stopped |= stop
    return _with_cut(chains, lengths, stopped, max_length)


def fixed_lengths(chains: Chains, num_candidates: int) -> Lengths:
    """Plain speculative decoding. Reads no features, so it goes past the record once the outcome is known."""
    known = ~chains.limited & ~chains.ends_unknown
    bound = torch.where(known, num_candidates, chains.available)
    lengths = bound.clamp(max=num_candidates)
    return _with_cut(chains, lengths, torch.zeros_like(known), num_candidates)


def oracle_lengths(chains: Chains, costs: CostModel, max_length: int) -> Lengths:
    """The best that any policy with 0 to ``max_length`` candidates can do, knowing every outcome.

    All policies emit the same tokens, so the highest long-run rate is the least time: a shortest path through each
    prompt's starts, found from its end. No policy's walk is faster.
    """
    choices = torch.arange(max_length + 1)  # [num_choices]
    bound = fixed_lengths(chains, max_length).candidates  # [num_starts]
    seconds = torch.from_numpy(costs.fixed_seconds(1, max_length))  # [max_length + 1]
    ends, sizes = chains.prompt_starts[1:], chains.prompt_starts.diff()
    to_go = torch.zeros(chains.num_starts + 1, dtype=torch.float64)  # seconds from a start to its prompt's end
    best = torch.zeros(chains.num_starts, dtype=torch.int64)
    for back in range(1, int(sizes.max()) + 1):
        prompt = (sizes >= back).nonzero().squeeze(1)
        here = ends[prompt] - back  # [num_rows]
        length = torch.minimum(choices, bound[here, None])  # [num_rows, num_choices]
        after = here[:, None] + torch.minimum(length, chains.run[here, None]) + 1
        rest = torch.where(after < ends[prompt, None], to_go[after], 0.0)
        to_go[here], choice = (seconds[length] + rest).min(dim=1)
        best[here] = length.gather(1, choice[:, None]).squeeze(1)
    return Lengths(best, torch.zeros_like(chains.limited))


def walk(chains: Chains, lengths: Lengths, costs: CostModel) -> Walk:
    """Run every prompt from its first start to its end with the policy's lengths."""
    accepted = torch.minimum(lengths.candidates, chains.run)  # [num_starts]
    prompt = chains.prompt_of_start
    ends = chains.prompt_starts[1:][prompt]  # [num_starts]
    after = torch.arange(chains.num_starts) + accepted + 1
    visited = torch.zeros(chains.num_starts, dtype=torch.bool)
    here = chains.prompt_starts[:-1]
    while len(here):
        visited[here] = True
        here = after[here][after[here] < ends[here]]
    rounds = visited.nonzero().squeeze(1)
    candidates = lengths.candidates[rounds]
    passes = candidates if lengths.passes is None else lengths.passes[rounds]
    longest = max(int(lengths.candidates.max()), int(passes.max()))
    draft = torch.tensor([costs.draft_seconds([1] * k) for k in range(longest + 1)], dtype=torch.float64)
    verify = torch.tensor([costs.verify.at(n) for n in range(longest + 2)], dtype=torch.float64)

    def total(values: Tensor) -> Tensor:
        sums = torch.zeros(len(chains.prompts), dtype=torch.float64)
        return sums.index_add_(0, prompt[rounds], values.double())

    return Walk(
        tokens=total(accepted[rounds] + 1),
        rounds=total(torch.ones_like(rounds)),
        candidates=total(candidates),
        accepted=total(accepted[rounds]),
        seconds=total(draft[passes] + verify[candidates + 1]),
        cut=total(lengths.cut[rounds]),
    )


def _with_cut(chains: Chains, lengths: Tensor, stopped: Tensor, max_length: int) -> Lengths:
    cut = ~stopped & (lengths == chains.available) & (lengths < max_length) & ~chains.limited
    return Lengths(lengths, cut)
