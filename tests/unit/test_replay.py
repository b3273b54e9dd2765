# SPDX-License-Identifier: Apache-2.0
"""The replay of recorded rounds against runs of the process that was recorded."""

from __future__ import annotations

import functools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import recorded_process
from tests.recorded_process import HIDDEN, Process, chains_of, record, rule_length, run_policy
from vllm_specdecpp.costs.model import CostModel
from vllm_specdecpp.decision.round import DraftRound
from vllm_specdecpp.decision.rules import StopRule, ThresholdRule
from vllm_specdecpp.head.files import Calibration
from vllm_specdecpp.head.model import AcceptanceHead
from vllm_specdecpp.training.replay.chains import Chains, concatenate
from vllm_specdecpp.training.replay.replay import (
    Lengths,
    RecordedEstimator,
    at,
    fixed_lengths,
    oracle_lengths,
    survivals,
    threshold_lengths,
    walk,
)

COSTS = CostModel({1: 0.05}, {1: 0.31 / 7}, {1: 0.19, 2: 0.20, 9: 0.26})
THRESHOLDS = (0.05, 0.3, 0.5, 0.8, 0.97)
RECORDED = 24
"""Longer than any run of matches below, so that no round is accepted whole."""
HEADS: dict[str, Any] = {
    "paper": {"lag": 1},
    "paper, calibrated": {"lag": 1, "calibrated": True},
    "look-ahead": {"lag": 0, "features": ("top1_prob", "entropy", "margin"), "calibrated": True},
}
POLICIES = ["confidence", "entropy", *HEADS]


def make_head(lag: int, features: tuple[str, ...] = (), calibrated: bool = False) -> AcceptanceHead:
    torch.manual_seed(3)
    head = AcceptanceHead(HIDDEN, 1, lag=lag, features=features).eval()
    with torch.no_grad():
        head.output.bias.copy_(torch.tensor([-0.7, 0.7]))
    if calibrated:
        head.calibration = Calibration(slope=1.3, intercepts=[1.5, 0.2, -0.6])
    return head


def policy(name: str) -> tuple[str, AcceptanceHead | None]:
    """(rule, head) of one of POLICIES."""
    return ("threshold", make_head(**HEADS[name])) if name in HEADS else (name, None)


@functools.cache
def processes(num: int = 6, num_tokens: int = 150, match: float = 0.6) -> tuple[Process, ...]:
    return tuple(Process(num_tokens, match, seed) for seed in range(num))


@functools.cache
def recorded(num_candidates: int = RECORDED) -> Any:
    return record(processes(), num_candidates, sets=("a", "b"))


def lengths_of(chains: Chains, name: str, threshold: float, max_length: int) -> Lengths:
    rule, head = policy(name)
    survival = survivals(chains, RecordedEstimator(rule, chains, head), max_length)
    return threshold_lengths(chains, survival, threshold, max_length)


def run_rule(chains: Chains, rule: StopRule, max_length: int) -> Lengths:
    """The engine's own loop over all starts at once; the rule's estimator is a :class:`RecordedEstimator`."""
    state = DraftRound(rule, chains.available.clamp(max=max_length))
    stopped = torch.zeros(chains.num_starts, dtype=torch.bool)
    for k in range(max_length):
        ran = state.running.bool()
        rows = ran.nonzero().squeeze(1)  # [num_rows]
        steps = chains.first_step[rows] + k
        state.observe(at(steps), rows)
        state.append(chains.token_ids[steps], rows)
        stopped |= ran & rule.should_stop(state.survival, k)
    lengths = state.lengths.long()
    cut = ~stopped & (lengths == chains.available) & (lengths < max_length) & ~chains.limited
    return Lengths(lengths, cut)


class TestAgainstTheProcess:
    """Every policy restarts inside recorded runs and must do exactly what it would have done in the process."""

    @pytest.mark.parametrize("name", POLICIES)
    def test_rules(self, name: str) -> None:
        rule, head = policy(name)
        chains = chains_of(recorded(), RECORDED, head)
        assert chains.num_starts == sum(process.num_tokens for process in processes())  # nothing was left out
        seen: set[int] = set()
        for threshold in THRESHOLDS:
            lengths = lengths_of(chains, name, threshold, 8)
            assert not lengths.cut.any()
            found = walk(chains, lengths, COSTS)
            for i, process in enumerate(processes()):
                expected = run_policy(process, rule_length(process, rule, threshold, 8, head))
                assert [int(x[i]) for x in (found.tokens, found.rounds, found.candidates, found.accepted)] == [
                    expected.tokens, expected.rounds, expected.candidates, expected.accepted,
                ]  # fmt: skip
            seen |= set(lengths.candidates.tolist())
        assert len(seen) >= 8  # the comparison met nearly all lengths from 0 to 8

    @pytest.mark.parametrize("num_candidates", [1, 2, 5, 16, 24])
    def test_fixed(self, num_candidates: int) -> None:
        chains = chains_of(recorded(), RECORDED)
        found = walk(chains, fixed_lengths(chains, num_candidates), COSTS)
        for i, process in enumerate(processes()):
            expected = run_policy(process, lambda place, bound: min(num_candidates, bound))
            # Near the end of a text, the request's own limit is only known where it cut the recorded round.
            assert abs(int(found.candidates[i]) - expected.candidates) <= num_candidates
            assert (int(found.rounds[i]), int(found.accepted[i])) == (expected.rounds, expected.accepted)

    def test_seconds_are_the_rounds_costs(self) -> None:
        chains = chains_of(recorded(), RECORDED)
        lengths = lengths_of(chains, "confidence", 0.5, 8)
        found = walk(chains, lengths, COSTS)
        for i, process in enumerate(processes()):
            drafted: list[int] = []
            inner = rule_length(process, "confidence", 0.5, 8)

            def noted(place: int, bound: int, inner: Any = inner, drafted: list[int] = drafted) -> int:
                drafted.append(inner(place, bound))
                return drafted[-1]

            run_policy(process, noted)
            assert float(found.seconds[i]) == pytest.approx(sum(COSTS.round_seconds([1] * k, k + 1) for k in drafted))

    def test_in_law_where_bonus_tokens_were_left_out(self) -> None:
        """Short recorded rounds are often accepted whole. Matches here are independent, so leaving out the places of
        bonus tokens changes no law: rates agree up to chance."""
        process = Process(30_000, 0.75, 99)
        chains = chains_of(record([process], 5), 5)
        assert chains.num_starts < 0.95 * process.num_tokens
        for k in (1, 3, 5):
            found = walk(chains, fixed_lengths(chains, k), COSTS)
            expected = run_policy(process, lambda place, bound: min(k, bound))  # noqa: B023
            tokens_a_round = float(found.tokens.sum() / found.rounds.sum())
            assert tokens_a_round == pytest.approx(expected.tokens / expected.rounds, rel=0.02)

    def test_the_comparison_can_fail(self) -> None:
        """A replay that restarted recorded rounds one step early would be found out."""
        chains = chains_of(recorded(), RECORDED)
        early = replace(chains, first_step=(chains.first_step - 1).clamp(min=0))
        found = lengths_of(early, "confidence", 0.5, 8)
        assert not torch.equal(found.candidates, lengths_of(chains, "confidence", 0.5, 8).candidates)


class TestOneLoop:
    @pytest.mark.parametrize("name", POLICIES)
    @pytest.mark.parametrize("num_candidates", [3, RECORDED])
    def test_sweep_equals_the_rules_own_loop(self, name: str, num_candidates: int) -> None:
        """Lengths from survivals computed once are those of DraftRound, for each threshold and bound."""
        rule, head = policy(name)
        chains = chains_of(recorded(num_candidates), num_candidates, head)
        estimator = RecordedEstimator(rule, chains, head)
        survival = survivals(chains, estimator, 12)
        for threshold in THRESHOLDS:
            for max_length in (1, 3, 12):
                expected = run_rule(chains, ThresholdRule(estimator, threshold), max_length)
                found = threshold_lengths(chains, survival, threshold, max_length)
                assert torch.equal(found.candidates, expected.candidates)
                assert torch.equal(found.cut, expected.cut)

    @pytest.mark.parametrize("name", ["confidence", "look-ahead"])
    def test_a_policy_cannot_see_outcomes(self, name: str) -> None:
        """Other outcomes behind the same features: same lengths. The oracle, which looks, changes its mind."""
        rule, head = policy(name)
        shard = recorded()
        other = SimpleNamespace(**vars(shard))
        other.num_accepted = torch.zeros_like(shard.num_accepted)
        chains, blind = chains_of(shard, RECORDED, head), chains_of(other, RECORDED, head)
        first = {step: i for i, step in enumerate(chains.first_step.tolist()) if chains.available[i]}
        shared = [(first[step], i) for i, step in enumerate(blind.first_step.tolist()) if blind.available[i]]
        assert len(shared) > 100
        here, there = torch.tensor(shared).unbind(1)
        for threshold in THRESHOLDS:
            seen = lengths_of(chains, name, threshold, 8).candidates[here]
            assert torch.equal(seen, lengths_of(blind, name, threshold, 8).candidates[there])
        oracle = oracle_lengths(chains, COSTS, 8).candidates[here]
        assert not torch.equal(oracle, oracle_lengths(blind, COSTS, 8).candidates[there])


class TestBookkeeping:
    @pytest.mark.parametrize("num_candidates", [1, 2, 4, RECORDED])
    def test_every_policy_emits_the_same_tokens(self, num_candidates: int) -> None:
        chains = chains_of(recorded(num_candidates), num_candidates)
        everything = [fixed_lengths(chains, k) for k in range(1, num_candidates + 1)]
        everything += [lengths_of(chains, "confidence", h, num_candidates) for h in THRESHOLDS]
        everything += [oracle_lengths(chains, COSTS, num_candidates)]
        for lengths in everything:
            found = walk(chains, lengths, COSTS)
            assert torch.equal(found.tokens, chains.prompt_starts.diff().double())
            assert torch.equal(found.tokens, found.accepted + found.rounds)
        left_out = sum(p.num_tokens for p in processes()) - chains.num_starts
        whole = recorded(num_candidates).num_accepted == recorded(num_candidates).round_starts.diff()
        # Only bonus tokens are missing: of each round accepted whole, but for the last of a text.
        assert int(whole.sum()) - len(processes()) <= left_out <= int(whole.sum())
        assert (left_out > 0) == (num_candidates < RECORDED)

    def test_by_hand(self) -> None:
        """Rounds of 3: all accepted + bonus, then one accepted of 3, then all 2 of a last round that the limit cut."""
        shard = hand_made([3, 3, 2], [3, 1, 2], emitted=[1, 5, 7])
        chains = chains_of(shard, 3)
        assert chains.run.tolist() == [4, 3, 2, 1, 0, 2, 1, 0]
        assert chains.available.tolist() == [6, 5, 4, 3, 2, 2, 1, 0]
        assert chains.limited.tolist() == [False] * 5 + [True] * 3
        found = walk(chains, fixed_lengths(chains, 3), COSTS)
        # 3 + 1; then the second run's last place, rejected; then the last two and one more.
        assert [int(x) for x in (found.tokens, found.rounds, found.candidates)] == [8, 3, 8]
        found = walk(chains, fixed_lengths(chains, 2), COSTS)
        # Places 0-2, then 3 (2 candidates: accepted, rejected), then the last run.
        assert [int(x) for x in (found.rounds, found.candidates, found.accepted)] == [3, 6, 5]

    def test_a_gap_in_the_record_breaks_the_chain(self) -> None:
        joined = chains_of(hand_made([3, 3], [3, 1], emitted=[1, 5]), 3)
        broken = chains_of(hand_made([3, 3], [3, 1], emitted=[1, 9]), 3)
        assert joined.run.tolist() == [4, 3, 2, 1, 0]
        assert broken.run.tolist() == [3, 2, 1, 0, 1, 0]
        assert broken.ends_unknown.tolist() == [True] * 4 + [False] * 2

    def test_rounds_of_interleaved_requests_are_sorted_out(self) -> None:
        shard = hand_made([2, 2, 2, 2], [0, 1, 1, 0], emitted=[1, 1, 2, 3], prompt=[1, 0, 1, 0])
        chains = chains_of(shard, 2)
        assert [id_ for id_, _ in chains.prompts] == ["p1", "p0"]
        assert chains.prompt_starts.tolist() == [0, 3, 6]
        assert chains.run.tolist() == [0, 1, 0, 1, 0, 0]
        assert chains.token_ids[chains.first_step].tolist() == [0, 4, 5, 2, 3, 6]

    def test_prompts_that_were_not_chosen(self) -> None:
        everything = chains_of(recorded(), RECORDED)
        some = chains_of(recorded(), RECORDED, chosen=[i % 2 == 0 for i in range(6)])
        assert some.sets == ["a"] and everything.sets == ["a", "b"]
        only_a = everything.in_sets(["a"])
        whole = walk(everything, lengths_of(everything, "confidence", 0.5, 8), COSTS)
        part = walk(some, lengths_of(some, "confidence", 0.5, 8), COSTS)
        assert torch.equal(part.seconds, whole.seconds[only_a])
        assert whole.tokens_per_second(only_a) == pytest.approx(part.tokens_per_second())

    def test_concatenation_changes_nothing(self) -> None:
        head = make_head(**HEADS["look-ahead"])
        halves = [
            chains_of(recorded(), RECORDED, head, [(i < 3) == first for i in range(6)]) for first in (True, False)
        ]
        joined, whole = concatenate(halves), chains_of(recorded(), RECORDED, head)
        assert joined.prompts == whole.prompts
        for name in ("look-ahead", "entropy"):
            found = [walk(c, lengths_of(c, name, 0.4, 8), COSTS).seconds for c in (joined, whole)]
            assert torch.equal(*found)

    def test_outrunning_the_record_is_counted(self) -> None:
        """A round of 4 with a rejection: a rule that goes on past the record is cut, a fixed length is known."""
        shard = hand_made([4, 4], [2, 0], emitted=[1, 4])
        chains = chains_of(shard, 4)
        lengths = lengths_of(chains, "confidence", 0.999, 4)
        assert lengths.candidates.tolist() == [4, 3, 2, 4]
        assert lengths.cut.tolist() == [False, True, True, False]
        assert fixed_lengths(chains, 4).candidates.tolist() == [4, 4, 4, 4]
        assert not fixed_lengths(chains, 4).cut.any()
        assert walk(chains, lengths, COSTS).rates()["cut_rate"] == 0.0  # the walk meets neither of the two
        assert walk(chains, Lengths(lengths.candidates.clamp(max=1), lengths.cut), COSTS).rates()["cut_rate"] == 1 / 3

    def test_the_requests_own_limit_is_no_cut(self) -> None:
        chains = chains_of(hand_made([3], [1], emitted=[1]), 8)
        assert not lengths_of(chains, "confidence", 0.999, 8).cut.any()


class TestPolicies:
    @pytest.mark.parametrize("num_candidates", [4, RECORDED])
    def test_oracle_beats_every_policy(self, num_candidates: int) -> None:
        chains = chains_of(recorded(num_candidates), num_candidates)
        max_length = min(num_candidates, 8)
        best = walk(chains, oracle_lengths(chains, COSTS, max_length), COSTS)
        policies = [fixed_lengths(chains, k) for k in range(1, max_length + 1)]
        policies += [lengths_of(chains, name, h, max_length) for name in ("confidence", "entropy") for h in THRESHOLDS]
        generator = torch.Generator().manual_seed(0)
        bound = fixed_lengths(chains, max_length).candidates
        for _ in range(20):
            random = torch.randint(0, max_length + 1, (chains.num_starts,), generator=generator)
            policies.append(Lengths(torch.minimum(random, bound), torch.zeros_like(chains.limited)))
        for lengths in policies:
            assert (walk(chains, lengths, COSTS).seconds >= best.seconds - 1e-9).all()

    @pytest.mark.parametrize("seed", range(8))
    @pytest.mark.parametrize("costs", [COSTS, CostModel({1: 0.3}, {1: 0.005}, {1: 0.2, 2: 0.4, 3: 0.1, 4: 0.4})])
    def test_oracle_is_the_best_there_is(self, seed: int, costs: CostModel) -> None:
        """Against every combination of lengths; the second costs make longer rounds cheaper, as some CPUs do."""
        process = Process(12, 0.6, seed)
        chains = chains_of(record([process], 8), 8)
        assert chains.num_starts == process.num_tokens

        @functools.cache
        def least(place: int) -> float:
            if place >= process.num_tokens:
                return 0.0
            times = []
            for length in range(4):
                length = min(length, process.num_tokens - place - 1)
                accepted = 0
                while accepted < length and process.matches[place + accepted]:
                    accepted += 1
                times.append(costs.round_seconds([1] * length, length + 1) + least(place + accepted + 1))
            return min(times)

        found = walk(chains, oracle_lengths(chains, costs, 3), costs)
        # The record does not show a limit that lies beyond a rejection; the oracle may draft past it there.
        assert float(found.seconds[0]) == pytest.approx(least(0), abs=1e-9)

    def test_extreme_thresholds_are_fixed_lengths(self) -> None:
        chains = chains_of(recorded(), RECORDED)
        for threshold, k in ((1e-6, 1), (1 - 1e-6, 8)):
            chains.scalars["top1_prob"].clamp_(0.5, 0.999)  # never sure, never hopeless
            found = walk(chains, lengths_of(chains, "confidence", threshold, 8), COSTS)
            expected = walk(chains, fixed_lengths(chains, k), COSTS)
            assert torch.equal(found.rounds, expected.rounds)
            assert (found.seconds - expected.seconds).abs().max() < 8 * COSTS.draft_seconds([1])  # the texts' ends

    def test_papers_rates(self) -> None:
        """T = t_draft N + t_draft N_discarded + (t_target - t_draft) N_target, the paper's identity."""
        draft, target = 0.03, 0.2
        costs = CostModel({1: draft}, {1: draft}, {1: target})
        chains = chains_of(recorded(), RECORDED)
        found = walk(chains, lengths_of(chains, "entropy", 0.5, 8), costs)
        rates, num = found.rates(), float(found.tokens.sum())
        seconds = num * (draft + draft * rates["discard_rate"] + (target - draft) * rates["verification_rate"])
        assert float(found.seconds.sum()) == pytest.approx(seconds)
        assert rates["mean_candidate_length"] * rates["acceptance"] + 1 == pytest.approx(1 / rates["verification_rate"])

    def test_a_broken_head_drafts_one_candidate_or_two(self) -> None:
        head = make_head(lag=1)
        chains = chains_of(recorded(), RECORDED, head)
        assert chains.head_logits is not None
        chains.head_logits.fill_(torch.nan)
        found = threshold_lengths(chains, survivals(chains, RecordedEstimator("threshold", chains, head), 8), 0.5, 8)
        assert torch.equal(found.candidates, chains.available.clamp(max=2))


def hand_made(
    sizes: list[int], accepted: list[int], emitted: list[int], prompt: list[int] | None = None
) -> SimpleNamespace:
    """A shard of given rounds; the candidates' token ids are the steps' indices."""
    num = sum(sizes)
    return SimpleNamespace(
        hidden_states=torch.zeros(num, HIDDEN), token_ids=torch.arange(num, dtype=torch.int32),
        **{name: torch.full((num,), 0.9) for name in recorded_process.SCALARS},
        round_starts=torch.tensor([0, *sizes]).cumsum(0), num_accepted=torch.tensor(accepted, dtype=torch.int32),
        prompt_index=torch.tensor(prompt or [0] * len(sizes), dtype=torch.int32), emitted=torch.tensor(emitted),
        prompts=[{"id": f"p{i}", "set": "a"} for i in range(1 + max(prompt or [0]))],
    )  # fmt: skip
