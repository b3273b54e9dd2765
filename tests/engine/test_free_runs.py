# SPDX-License-Identifier: Apache-2.0
"""Runs that cost no draft pass, in a real engine: lossless in any mix with drafting, and taken where they pay."""

from __future__ import annotations

import random
from itertools import accumulate
from operator import and_, eq
from typing import Any

import numpy as np
import pytest
import torch

from tests import engine_harness as harness
from tests.exact_law import p_value
from vllm_specdecpp.decision.cost_aware.drafting import CostAwareRound
from vllm_specdecpp.decision.cost_aware.free_runs import Taken
from vllm_specdecpp.engine.shared import cost_aware
from vllm_specdecpp.source_registry import RUN_SOURCES, register

MAX_LENGTH = 6
PART = harness.prompts(1, seed=7, shortest=12, longest=12)[0]
PROMPTS = [[*p, *PART[: 4 + i], *p[::2], *PART[: 2 + i]] for i, p in enumerate(harness.prompts(8, seed=5, longest=30))]
FLAT = {"first": {1: 20e-3}, "step": {1: 20e-3}, "verify": {1: 20e-3, 64: 20.1e-3}}
"""Seconds: rows cost nothing, draft passes much."""
PROMPT, LAW_LENGTH = [3, 5, 3, 7, 3], 4


class MixedRound(CostAwareRound):
    """A draft ends where a run goes on, and a run goes on behind a draft, cut anywhere, by chance."""

    def __init__(self, mixed: Mixed, *args: Any, **kwargs: Any) -> None:
        super().__init__(mixed.rule, *args, **kwargs)
        self._mixed = mixed

    def outrun(self, row: int, runs: Any, survival: float, accept: float, num_running: int) -> bool:
        ends = bool(runs) and self._mixed.random.random() < 0.2
        self._mixed.kinds["ended"] += ends
        return ends

    def follow(self, runs: Any, survival: Any) -> None:
        for i, proposed in enumerate(runs):
            if proposed and self._mixed.random.random() < 0.6:
                self.free.runs[i] = proposed[0]
                self.free.lengths[i] = self._mixed.random.randint(1, len(proposed[0].token_ids))
                self._mixed.kinds["behind a draft"] += bool(self.lengths[i])


class Mixed:
    """In place of the rule's choice: each request drafts, takes a run, both, or does nothing, by chance."""

    def __init__(self, llm: Any, seed: int) -> None:
        self.rule = harness.proposer(llm).cost_aware.rule
        self.random = random.Random(seed)
        kinds = "draft", "run", "both in a batch", "ended", "behind a draft"
        self.kinds: dict[str, int] = dict.fromkeys(kinds, 0)

    def begin(self, batch: Any, runs: Any = ()) -> CostAwareRound:
        limits = np.array([min(s.limit, self.random.randint(1, MAX_LENGTH)) for s in batch])
        chance = [self.random.random() for _ in batch]
        free = Taken([None] * len(batch), np.zeros(len(batch), np.int64), np.zeros(len(batch)))
        for i, proposed in enumerate(runs):
            if proposed and limits[i] and chance[i] < 0.5:
                free.runs[i], free.lengths[i] = proposed[0], min(limits[i], len(proposed[0].token_ids))
        drafts = (limits > 0) & (free.lengths == 0) & (np.array(chance) < 0.9)
        self.kinds["draft"] += int(drafts.sum())
        self.kinds["run"] += int((free.lengths > 0).sum())
        self.kinds["both in a batch"] += bool(drafts.any() and free.lengths.any())
        return MixedRound(self, [s.request_id for s in batch], limits, drafts, 0.0, free=free)

    @classmethod
    def put(cls, llm: Any, monkeypatch: Any, seed: int) -> Mixed:
        mixed = cls(llm, seed)
        monkeypatch.setattr(cost_aware, "MOST_SEARCHING", 1e9)
        monkeypatch.setattr(mixed.rule, "begin", mixed.begin)
        monkeypatch.setattr(mixed.rule, "finish", lambda *args: None)
        return mixed


class Knows:
    """A source that says what the target will say, and now and then something else."""

    name = "suffix"

    def __init__(self, texts: list[list[int]], seed: int) -> None:
        self._texts, self._random = texts, random.Random(seed)

    def run(self, tokens: Any, most: int) -> Any:
        # That of the same prompt: a draft's candidates, at the end of the tokens, may be wrong.
        text = max(self._texts, key=lambda text: sum(accumulate(map(eq, tokens.tolist(), text), and_)))
        run = [self._random.choice([t] * 5 + [3]) for t in text[len(tokens) : len(tokens) + most]]
        return np.array(run, dtype=np.int64), np.zeros(len(run))


@pytest.fixture(scope="module")
def baseline(tiny):
    with harness.engine(tiny.target) as llm:
        return harness.token_ids(harness.generate(llm, PROMPTS, ignore_eos=True))


@pytest.fixture(scope="module")
def llm(tiny, baseline):
    config = {
        "method": "specdecpp", "model": tiny.draft_good, "num_speculative_tokens": MAX_LENGTH, "trace_rounds": 100_000,
    }  # fmt: skip
    # A pass of at most 24 tokens: catching up takes several.
    with harness.engine(tiny.target, config, enable_prefix_caching=True, max_num_batched_tokens=24) as llm:
        yield llm


def test_runs_that_pay_are_taken_and_no_draft_pass_is_run(llm, baseline):
    rule = harness.set_costs(llm, FLAT)
    llm.collective_rpc("specdecpp_stats", kwargs={"reset": True})
    rule.purse.balance = -1e9  # nothing is tried
    outputs = harness.generate(llm, PROMPTS, ignore_eos=True)
    assert harness.token_ids(outputs) == baseline
    stats = llm.collective_rpc("specdecpp_stats")[0]
    assert stats["draft_passes"] == 0 and stats["accepted"] > 0
    runs = stats["cost_aware"]["sources"]["suffix"]
    # The outcomes of a request's last round are not seen.
    assert 0 <= runs["accepted"] <= stats["accepted"] and 20 < runs["candidates"] <= stats["candidates"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.asks(11)
def test_any_mix_of_runs_and_drafts_leaves_greedy_output_alone(llm, baseline, reference, monkeypatch, seed):
    """And the draft's KV is right behind runs that were accepted, and rejected: its candidates are as ever."""
    llm.reset_prefix_cache()
    mixed, draft = Mixed.put(llm, monkeypatch, seed), reference("draft_good")
    texts = [prompt + tokens for prompt, tokens in zip(PROMPTS, baseline, strict=True)]
    monkeypatch.setattr(mixed.rule, "sources", [Knows(texts, seed)])
    harness.take_rounds(llm)
    drafted = known = behind = 0
    for _ in range(2):  # the second time with cached prompts
        outputs = harness.generate(llm, PROMPTS, ignore_eos=True)
        assert harness.token_ids(outputs) == baseline
        trace = harness.take_rounds(llm)
        rounds_of = harness.rounds_of(outputs, trace)
        # In the place of the next token: how many the draft model drew.
        drawn_of = harness.rounds_of(outputs, [r | {"next_token": r["drafted"]} for r in trace])
        for prompt, tokens, rounds, drawn in zip(PROMPTS, baseline, rounds_of, drawn_of, strict=True):
            emitted = 1  # by the prefill
            for (candidates, accepted, _), (_, _, num_drawn) in zip(rounds, drawn, strict=True):
                prefix: list[int] = [*prompt, *tokens[:emitted]]
                for k, token in enumerate(candidates[:num_drawn]):
                    assert token == draft.steps([*prefix, *candidates[:k]])[0].token
                drafted += num_drawn > 0
                known += accepted > num_drawn  # a run is what the target says
                behind += accepted > num_drawn > 0
                emitted += accepted + 1
    assert min(mixed.kinds.values()) > 20 and known > 20 and behind > 10
    assert drafted >= mixed.kinds["draft"] - 3 * 2 * len(PROMPTS)  # outcomes of last rounds are not seen


def test_the_rule_itself_lets_runs_go_on_behind_drafts(llm, baseline, monkeypatch):
    """A source that is often right, but knows of nothing before two tokens of an output are there."""
    llm.reset_prefix_cache()
    texts = [prompt + tokens for prompt, tokens in zip(PROMPTS, baseline, strict=True)]
    source = Knows(texts, 1)
    shortest = min(map(len, PROMPTS)) + 2
    known = source.run

    def run(tokens: Any, most: int) -> Any:
        found, x = known(tokens, most if len(tokens) % 3 else 1)
        return (found, x) if len(tokens) > shortest and len(tokens) % 3 else (found[:0], x[:0])

    monkeypatch.setattr(source, "run", run)
    rule = harness.set_costs(llm, {"first": {1: 4e-3}, "step": {1: 4e-3}, "verify": {1: 20e-3, 64: 20.1e-3}})
    harness.forget(rule)
    harness.proposer(llm).cost_aware.drop_round()  # of a test before
    monkeypatch.setattr(rule, "sources", [source])
    monkeypatch.setattr(cost_aware, "MOST_SEARCHING", 1e9)
    for _ in range(2):
        assert harness.token_ids(harness.generate(llm, PROMPTS, ignore_eos=True)) == baseline
    harness.take_rounds(llm)
    follow = CostAwareRound.follow
    told: list[Any] = []

    def followed(self: CostAwareRound, runs: Any, survival: Any) -> None:
        looks = np.isfinite(self.looks).sum(axis=0)
        told.extend(zip(looks - self.lengths, self.lengths, survival, self.expected, strict=True))
        follow(self, runs, survival)

    monkeypatch.setattr(CostAwareRound, "follow", followed)
    assert harness.token_ids(harness.generate(llm, PROMPTS, ignore_eos=True)) == baseline
    rounds = harness.take_rounds(llm)
    both = [r for r in rounds if 0 < r["drafted"] < len(r["candidates"])]
    assert len(both) > 10 and sum(r["accepted"] > r["drafted"] for r in both) > 5
    monkeypatch.setattr(cost_aware, "MOST_SEARCHING", 0.0)  # too dear to search after each candidate
    monkeypatch.setattr(CostAwareRound, "outrun", lambda *args: pytest.fail("searched"))
    assert harness.token_ids(harness.generate(llm, PROMPTS, ignore_eos=True)) == baseline
    monkeypatch.setattr(cost_aware, "MOST_SEARCHING", 1e9)
    monkeypatch.setattr(CostAwareRound, "outrun", lambda *args: False)
    harness.set_costs(llm, {"first": {1: 1e-3}, "step": {1: 1e-3}, "verify": {1: 20e-3, 64: 20e-3 + 63 * 8e-3}})
    told.clear()
    assert harness.token_ids(harness.generate(llm, PROMPTS, ignore_eos=True)) == baseline
    # In front of a run: nothing, or one candidate, expected to be accepted as often as it is estimated to be; not the
    # one that was looked at and dropped, since it is not worth its row.
    ones = [(s, expected) for _, length, s, expected in told if length == 1]
    assert ones and all(0 < s < 1 and s == pytest.approx(expected, abs=1e-4) for s, expected in ones)
    assert any(dropped > 0 for dropped, length, *_ in told if length < 2)
    assert all(s == 1 for _, length, s, _ in told if not length)


@pytest.fixture(scope="module", params=["greedy", "probabilistic"])
def sampling_llm(request, tiny):
    config = {
        "method": "specdecpp", "model": tiny.small_draft, "num_speculative_tokens": 5,
        "draft_sample_method": request.param, "trace_rounds": 100_000,
    }  # fmt: skip
    with harness.engine(tiny.small_target, config, **harness.SMALL) as llm:
        llm.draft_sample_method = request.param
        yield llm


def law_p_value(llm: Any, law: Any, temperature: float) -> float:
    found = harness.first_tokens(llm, PROMPT, 2048, LAW_LENGTH, 1, temperature=temperature)
    return p_value(found, law(PROMPT, LAW_LENGTH, temperature))


def test_any_mix_follows_the_exact_law(sampling_llm, law, monkeypatch):
    mixed = Mixed.put(sampling_llm, monkeypatch, 11)
    harness.take_rounds(sampling_llm)
    temperature = 1.0 if sampling_llm.draft_sample_method == "greedy" else 0.7
    assert law_p_value(sampling_llm, law, temperature) > 1e-4
    assert 0.05 < harness.accepted_share(harness.take_rounds(sampling_llm)) < 0.95
    assert min(mixed.kinds.values()) > 20


@pytest.mark.parametrize("row", [[0.125] * 8, [0.0] * 7 + [1.0]], ids=["uniform", "another token"])
def test_wrong_draft_probabilities_are_noticed(sampling_llm, law, monkeypatch, row):
    if sampling_llm.draft_sample_method == "greedy":
        pytest.skip("no draft probabilities")
    Mixed.put(sampling_llm, monkeypatch, 11)
    proposer = harness.proposer(sampling_llm)
    original = proposer._mix_in

    def wrong(drawn: list[list[int]], candidates: list[list[int]]) -> None:
        original(drawn, candidates)
        for index, (mine, all_of_them) in enumerate(zip(drawn, candidates, strict=True)):
            proposer._last_draft_probs[index, len(mine) : len(all_of_them)] = torch.tensor(row)

    monkeypatch.setattr(proposer, "_mix_in", wrong)
    assert law_p_value(sampling_llm, law, 1.0) < 1e-12


def test_a_source_that_is_one_class_and_one_registration_is_used(tiny, monkeypatch):
    class Again:
        """The last token once more."""

        name = "again"
        depends_on = "the last token"
        start = (1.0, 3.0)
        cache = object()  # of its own: nobody else's business

        def run(self, tokens: Any, most: int) -> Any:
            return np.resize(tokens[-1:], most), np.zeros(most)

    monkeypatch.delitem(RUN_SOURCES, "again", raising=False)
    register("again", Again)
    config = {"method": "specdecpp", "model": tiny.draft_good, "sources": ["again", "draft_model"], "trace_rounds": 999}
    try:
        with harness.engine(tiny.target, config) as llm:
            harness.set_costs(llm, FLAT).purse.balance = -1e9
            harness.generate(llm, PROMPTS, ignore_eos=True)
            sources = llm.collective_rpc("specdecpp_stats")[0]["cost_aware"]["sources"]
            runs = [r["candidates"] for r in harness.take_rounds(llm) if r["candidates"]]
    finally:
        RUN_SOURCES.pop("again")
    assert set(sources) == {"again"} and sources["again"]["candidates"] > 0
    assert all(len(set(run)) == 1 for run in runs)
