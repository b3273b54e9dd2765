# SPDX-License-Identifier: Apache-2.0
"""The cost-aware rule in a real engine: rounds without drafting, and what follows them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from tests import engine_harness as harness
from tests.reference_loop import answer
from vllm_specdecpp.decision.cost_aware.tail import CostAwareTail
from vllm_specdecpp.decision.estimator import ConfidenceEstimator
from vllm_specdecpp.decision.round import DraftRound

MAX_LENGTH = 6
PROMPTS = harness.prompts(12, seed=31, longest=60)
DEAR = {"first": {1: 20e-3}, "step": {1: 20e-3}, "verify": {1: 20e-3, 64: 60e-3}}
"""Seconds: drafting never is."""
LONG = {"first": {1: 40e-3}, "step": {1: 1e-3}, "verify": {1: 20e-3, 64: 22e-3}, "read": {1: 40e-3}}
"""Seconds: one candidate is not worth its pass, many are if the draft is mostly right."""


@pytest.fixture(scope="module")
def llm(tiny):
    config = {
        "method": "specdecpp", "model": tiny.draft_good, "num_speculative_tokens": MAX_LENGTH, "trace_rounds": 100_000,
    }  # fmt: skip
    # A pass of at most 24 tokens: catching up takes several.
    with harness.engine(tiny.target, config, enable_prefix_caching=True, max_num_batched_tokens=24) as llm:
        yield llm


@pytest.fixture(scope="module")
def baseline(reference):
    return [answer(reference("target"), prompt, 40) for prompt in PROMPTS]


class _Scripted:
    """In place of ``CostAwareDrafting``: drafts for the requests that ``plan`` names, as far as ``random`` says."""

    def __init__(self, plan: Any, seed: int) -> None:
        self._plan, self._random = plan, random.Random(seed)
        self.steps: list[dict[str, Any]] = []

    def begin(self, batch: Any, outcomes: Any, stop_token_ids: Any, *times: Any) -> Any:
        limits = [s.limit if s.limit > 0 and self._plan(s.request_id) else 0 for s in batch]
        tail = CostAwareTail(ConfidenceEstimator(), len(batch), MAX_LENGTH, 64, "cpu", self._tail)
        tail.open()
        return DraftRound(tail, torch.tensor(limits), stop_token_ids=stop_token_ids)

    def free_runs(self, num_reqs: int) -> list[list[int]]:
        return [[] for _ in range(num_reqs)]

    def end_outrun(self, drawn: Any) -> None:
        pass

    def follow(self, drafted: Any) -> list[list[int]]:
        return self.free_runs(len(drafted))

    def timed(self, step: dict[str, Any]) -> None:
        self.steps.append(step)

    def _tail(self, scores: Any, token_ids: Any, step: int, **state: Any) -> None:
        """Submits and goes on as far as the limits and chance allow."""
        ran, n = state["running"].bool(), len(scores)
        submit = ran & torch.tensor([self._random.random() < 0.9 for _ in range(n)])
        state["lengths"] += submit
        state["draft_tokens"][:, step - 1] = token_ids.where(submit, -1)
        room = state["lengths"] < state["params"].limits[:n]
        go_on = submit & room & torch.tensor([self._random.random() < 0.7 for _ in range(n)])
        state["running"].copy_(go_on & (state["stop_token_ids"] != token_ids[:, None]).all(dim=1))


PLANS = {
    "all rounds": lambda rng: lambda request_id: True,
    "some requests, some rounds": lambda rng: lambda request_id: rng.random() < 0.4,
    "long stretches": lambda rng: _stretches(rng),
}


def _stretches(rng: random.Random) -> Any:
    state = {"on": True}

    def plan(request_id: str) -> bool:
        if rng.random() < 0.05:
            state["on"] = not state["on"]
        return state["on"]

    return plan


@pytest.mark.parametrize("plan", PLANS)
def test_candidates_are_the_drafts_own_after_rounds_without_drafting(llm, baseline, reference, monkeypatch, plan):
    """Whatever was skipped: a wrong or missing KV entry of the draft would show as a candidate that is not its own.

    A prompt is read when its request is first drafted for, in several passes; some come from the prefix cache.
    """
    llm.reset_prefix_cache()
    scripted = _Scripted(PLANS[plan](random.Random(5)), seed=6)
    monkeypatch.setattr(harness.proposer(llm), "cost_aware", scripted)
    draft = reference("draft_good")
    harness.take_rounds(llm)
    checked = lengths = 0
    for _ in range(2 if plan == "long stretches" else 1):  # the second time with cached prompts
        outputs = harness.generate(llm, PROMPTS, ignore_eos=True)
        assert harness.token_ids(outputs) == baseline
        for prompt, tokens, rounds in zip(
            PROMPTS, baseline, harness.rounds_of(outputs, harness.take_rounds(llm)), strict=True
        ):
            emitted = 1  # by the prefill
            for candidates, accepted, next_token in rounds:
                context = [*prompt, *tokens[:emitted]]
                for candidate in candidates:
                    assert candidate == draft.steps(context)[0].token
                    context.append(candidate)
                    checked += 1
                lengths |= 1 << len(candidates)
                emitted += accepted + 1
                assert emitted > len(tokens) or tokens[emitted - 1] == next_token
    assert checked > 100 and bin(lengths).count("1") >= 5
    read = [step["read"] for step in scripted.steps if step.get("read")]
    assert max(map(len, read)) > 1  # more than one pass can read


@pytest.mark.asks(15)
def test_a_prompt_is_read_when_its_request_is_first_drafted_for(llm, reference, monkeypatch):
    llm.reset_prefix_cache()
    prompt, seen = PROMPTS[0] * 2, []

    def from_the_third_round_on(request_id: str) -> bool:
        seen.append(request_id)
        return len(seen) >= 3

    scripted = _Scripted(from_the_third_round_on, seed=1)
    monkeypatch.setattr(harness.proposer(llm), "cost_aware", scripted)
    draft, tokens = reference("draft_good"), answer(reference("target"), prompt, 24)
    harness.take_rounds(llm)
    outputs = harness.generate(llm, [prompt], max_tokens=24, ignore_eos=True)
    assert harness.token_ids(outputs) == [tokens]
    steps = scripted.steps
    first = next(i for i, step in enumerate(steps) if step["passes"])
    assert first == -(-len(prompt) // 24) + 1 and steps[first]["read"][:-1] == [24] * (len(steps[first]["read"]) - 1)
    assert sum(steps[first]["read"]) == len(prompt) + 3  # and what it has emitted
    assert not any(step.get("read") for i, step in enumerate(steps) if i != first)
    (rounds,) = harness.rounds_of(outputs, harness.take_rounds(llm))
    assert [len(candidates) for candidates, *_ in rounds[:2]] == [0, 0] and any(len(r[0]) > 1 for r in rounds)
    context = [*prompt, tokens[0]]
    for candidates, accepted, next_token in rounds:
        assert candidates == [draft.steps([*context, *candidates[:k]])[0].token for k in range(len(candidates))]
        context += [*candidates[:accepted], next_token]


def test_a_cold_engine_drafts_where_only_long_drafts_pay(llm, baseline):
    """Nobody knows yet how often the draft is right: that is tried at once, and as long as it has to be."""
    harness.forget(harness.set_costs(llm, LONG))
    harness.take_rounds(llm)
    assert harness.token_ids(harness.generate(llm, PROMPTS, ignore_eos=True)) == baseline
    first = harness.take_rounds(llm)[:8]
    assert max(len(r["candidates"]) for r in first) >= 4


def test_drafts_where_it_pays(llm, baseline, monkeypatch):
    admission = harness.set_costs(llm, harness.CHEAP).admission
    plan, expected = admission.plan, []

    def planned(*args):
        out = plan(*args)
        expected.append((admission.price, admission.speedup))
        return out

    monkeypatch.setattr(admission, "plan", planned)
    for _ in range(2):
        outputs = harness.generate(llm, PROMPTS, ignore_eos=True)
        assert harness.token_ids(outputs) == baseline
    stats = llm.collective_rpc("specdecpp_stats", kwargs={"reset": True})[0]
    assert stats["candidates"] > 2 * stats["rounds"] and stats["accepted"] > 0.5 * stats["candidates"]
    assert len(stats["lengths"]) == MAX_LENGTH + 1
    told = stats["cost_aware"]
    assert (told["admission"]["rho"], told["admission"]["speedup"]) == expected[-1]
    rho, speedup = np.median(expected, 0)  # the last round of all may have no room for a candidate
    assert rho > 1.5 / harness.CHEAP["verify"][1] and speedup > 1.5
    assert 0.5 < told["admission"]["acceptance"] < 1 and told["admission"]["looks"] > 100
    assert told["admission"]["purse_seconds"] >= 0
    assert told["calibration"]["slope"] > 0 and told["costs"]["step"] == {"1": 1e-3}


@pytest.mark.asks(1)
def test_drafts_next_to_nothing_where_it_does_not_and_comes_back(llm, baseline):
    harness.set_costs(llm, DEAR)
    assert harness.token_ids(harness.generate(llm, PROMPTS, ignore_eos=True)) == baseline
    llm.collective_rpc("specdecpp_stats", kwargs={"reset": True})
    assert harness.token_ids(harness.generate(llm, PROMPTS, ignore_eos=True)) == baseline
    stats = llm.collective_rpc("specdecpp_stats", kwargs={"reset": True})[0]
    assert stats["draft_passes"] < 0.1 * stats["rounds"]
    harness.set_costs(llm, harness.CHEAP)
    for _ in range(3):
        harness.generate(llm, PROMPTS, ignore_eos=True)
    llm.collective_rpc("specdecpp_stats", kwargs={"reset": True})
    harness.generate(llm, PROMPTS, ignore_eos=True)
    stats = llm.collective_rpc("specdecpp_stats")[0]
    assert stats["candidates"] > 1.5 * stats["rounds"]


def test_switched_off_requests_draft_nothing(llm):
    from vllm import SamplingParams

    harness.set_costs(llm, harness.CHEAP)
    harness.take_rounds(llm)
    params = [
        SamplingParams(
            temperature=0, max_tokens=24, ignore_eos=True, detokenize=False,
            extra_args={"specdecpp": {"enabled": bool(i % 2)}},
        )
        for i in range(len(PROMPTS))
    ]  # fmt: skip
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params, use_tqdm=False)
    drafted = [sum(len(r[0]) for r in rounds) for rounds in harness.rounds_of(outputs, harness.take_rounds(llm))]
    assert not any(drafted[::2]) and all(drafted[1::2])


def test_another_rule_and_back(llm):
    rule = harness.proposer(llm).cost_aware.rule
    harness.configure(llm, rule="fixed")
    harness.take_rounds(llm)
    harness.generate(llm, PROMPTS[:2], ignore_eos=True)
    assert max(len(r["candidates"]) for r in harness.take_rounds(llm)) == MAX_LENGTH
    harness.configure(llm, rule="cost_aware", num_speculative_tokens=2)
    harness.set_costs(llm, harness.CHEAP)
    harness.generate(llm, PROMPTS[:4], ignore_eos=True)
    assert {1, 2} <= {len(r["candidates"]) for r in harness.take_rounds(llm)} <= {0, 1, 2}
    assert harness.proposer(llm).cost_aware.rule is rule  # what it has learnt is kept
    harness.configure(llm, num_speculative_tokens=MAX_LENGTH)
