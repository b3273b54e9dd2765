# SPDX-License-Identifier: Apache-2.0
"""Sampled output follows the target's own law on Model Runner V2, when drafts end early and when they do not."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest
import torch

from tests import engine_harness as harness
from tests.exact_law import joint_law, p_value
from tests.v2 import async_on_cpu
from tests.v2 import harness as v2_harness
from tests.v2.run_rounds import quicker_runs
from tests.v2.verified import Verified
from vllm_specdecpp.costs import timing
from vllm_specdecpp.decision.cost_aware.tail import CostAwareTail
from vllm_specdecpp.engine.v2.round import DeviceRound

FAILS_BELOW = 1e-4
"""p-value. Seeds are fixed, so a passing case goes on passing; a planted bias lands far below."""
VOCAB, LENGTH, NUM_REQS = 4, 2, 400


def _law(target: torch.Tensor) -> dict[tuple[int, ...], float]:
    """Of tokens that do not depend on each other: [LENGTH + 1, VOCAB] logits → P(first LENGTH tokens)."""
    p = target.double().softmax(-1)
    rows = torch.cartesian_prod(*[torch.arange(VOCAB)] * LENGTH).tolist()
    return {tuple(row): float(p[range(LENGTH), row].prod()) for row in rows}


def _drafts(draft: torch.Tensor, peeks: bool) -> torch.Tensor:
    """[NUM_REQS, LENGTH] drawn tokens, -1 where the tokens before ended the draft, as ours do; or the token itself."""
    tokens = torch.stack([torch.multinomial(q.softmax(-1), NUM_REQS, replacement=True) for q in draft], dim=1)
    ends = tokens[:, 1] == tokens[:, 1].mode().values if peeks else tokens[:, 0] >= 2
    tokens[ends, 1] = -1
    return tokens


def _emitted(target: torch.Tensor, draft: torch.Tensor, drafts: torch.Tensor, block: bool) -> list[tuple[int, ...]]:
    """Verify all drafts with vLLM's kernels; what a round did not emit comes from the target alone."""
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample

    width = LENGTH + 1
    states = torch.arange(NUM_REQS)
    sampled, num_sampled = rejection_sample(
        target.repeat(NUM_REQS, 1).contiguous(),
        draft.repeat(NUM_REQS, 1, 1).contiguous(),
        torch.cat([torch.zeros(NUM_REQS, 1, dtype=torch.int64), drafts], dim=1).view(-1),
        torch.arange(NUM_REQS + 1, dtype=torch.int32) * width,
        torch.arange(width).repeat(NUM_REQS),
        states,
        states.repeat_interleave(width),
        torch.arange(width, dtype=torch.int32).repeat(NUM_REQS),
        torch.ones(NUM_REQS),
        torch.arange(NUM_REQS) + 12345,
        LENGTH,
        use_block_verification=block,
    )
    own = torch.stack([torch.multinomial(p.softmax(-1), NUM_REQS, replacement=True) for p in target], dim=1)
    rows = zip(sampled.tolist(), num_sampled.tolist(), own.tolist(), strict=True)
    return [tuple((row[:n] + more[n:])[:LENGTH]) for row, n, more in rows]


@pytest.mark.parametrize("block", [False, True], ids=["standard", "block"])
def test_verification_ends_without_bias_where_a_draft_ended(block):
    torch.manual_seed(1)
    target, draft = torch.randn(LENGTH + 1, VOCAB), torch.randn(LENGTH, VOCAB)
    drafts = _drafts(draft, peeks=False)
    assert 50 < int((drafts[:, 1] < 0).sum()) < NUM_REQS - 50
    assert p_value(_emitted(target, draft, drafts, block), _law(target)) > FAILS_BELOW


def test_a_peeking_stop_is_noticed():
    """The power of so many samples, whoever verifies them."""
    torch.manual_seed(1)
    target, draft = torch.randn(LENGTH + 1, VOCAB), torch.randn(LENGTH, VOCAB)
    drafts = _drafts(draft, peeks=True)
    assert p_value(verified(target, draft, drafts), _law(target)) < FAILS_BELOW


class _Given:
    """Scores that somebody gives: noise, or, where it peeks, what was drawn."""

    name, lag, needs = "given", 0, frozenset[str]()

    def __call__(self, features: Any, position: int) -> torch.Tensor:
        return self.scores

    scores: torch.Tensor


def _cost_aware_drafts(draft: torch.Tensor, num_reqs: int, peeks: bool) -> torch.Tensor:
    """[num_reqs, LENGTH] of one batch, in which each request goes on or not by how it compares with the others."""
    given = _Given()
    tail = CostAwareTail(given, num_reqs, LENGTH, 3 * num_reqs, "cpu")
    device = DeviceRound(torch.zeros(num_reqs, LENGTH, dtype=torch.int64))
    device.set_rule(tail, 1)
    device.limits[:, 0], device.limits[:, 1], device.limits[:, 2:] = LENGTH, 100, -1
    device.limits[:, 2] = 0  # a stop token, which ends a draft after it was submitted
    column = torch.full((num_reqs,), 10, dtype=torch.int32)
    device.start(num_reqs, column, column * 0, column)
    most = len(tail.params.bucket_of)
    # A score is the acceptance; a candidate is worth its row if it is 0.3 likely to be accepted.
    tail.params.load(
        limits=[LENGTH] * num_reqs, price=1.0, this=[1.0] + [0.0] * most, next=[0.7] + [0.0] * most, means=[0.6] * most,
        step_seconds=[1e-3] * (num_reqs + 1),
        verify_seconds=0.3 * np.arange(3 * num_reqs + 1),
    )  # fmt: skip
    device.admit()
    for step, q in enumerate(draft, 1):
        logits = q.repeat(num_reqs, 1)
        tokens = torch.multinomial(q.softmax(-1), num_reqs, replacement=True)
        given.scores = torch.rand(num_reqs)
        if peeks and step == 2:
            given.scores = torch.where(tokens == tokens.mode().values, 0.2, 0.8)
        device.observe_pass(step, logits, logits)
        device.append_drawn(tokens)
    return device.draft_tokens


def verified(target: torch.Tensor, draft: torch.Tensor, drafts: torch.Tensor) -> list[tuple[int, ...]]:
    """Rejection sampling as in the textbook; what a round did not emit comes from the target alone.

    Args:
        target: [LENGTH + 1, VOCAB] logits.
        draft: [LENGTH, VOCAB] logits of all requests, or [num_reqs, LENGTH, VOCAB].
        drafts: [num_reqs, LENGTH] candidates, then -1.
    """
    columns, drafting = [], torch.ones(len(drafts), dtype=torch.bool)
    laws = draft.softmax(-1).expand(len(drafts), LENGTH, VOCAB)
    for p, q, candidates in zip(target[:LENGTH].softmax(-1), laws.unbind(1), drafts.T, strict=True):
        tokens, drafting = candidates.clamp(min=0), drafting & (candidates >= 0)
        ratio = p[tokens] / q.gather(1, tokens[:, None]).squeeze(1)
        accepted = drafting & (torch.rand(len(drafts)) < ratio)
        recovered = torch.multinomial((p - q).clamp(min=0) + 1e-12, 1).squeeze(1)
        own = torch.multinomial(p, len(drafts), replacement=True)
        columns.append(torch.where(accepted, tokens, torch.where(drafting, recovered, own)))
        drafting = accepted
    return [tuple(row) for row in torch.stack(columns, dim=1).tolist()]


@pytest.mark.parametrize("peeks", [False, True])
def test_a_batch_that_the_cost_aware_rule_couples_follows_the_law(peeks):
    torch.manual_seed(1)
    target, draft = torch.randn(LENGTH + 1, VOCAB), torch.randn(LENGTH, VOCAB)
    drafts = _cost_aware_drafts(draft, 4000, peeks)
    lengths = (drafts >= 0).sum(dim=1).tolist()
    assert all(lengths.count(n) > 400 for n in range(LENGTH + 1))
    p = p_value(verified(target, draft, drafts), _law(target))
    assert p < FAILS_BELOW if peeks else p > FAILS_BELOW


PROMPT = [3, 5, 4, 7, 6]
CASES: dict[str, dict[str, Any]] = {
    "greedy drafts": {"draft_sample_method": "greedy"},
    "probabilistic drafts": {"draft_sample_method": "probabilistic"},
    "block verification": {"draft_sample_method": "probabilistic", "rejection_sample_method": "block"},
    "asynchronous": {"draft_sample_method": "probabilistic"},
    "cost-aware, asynchronous": {"draft_sample_method": "probabilistic", "rule": "cost_aware", "threshold": None},
}
CURVES = {"first": {1: 1e-3}, "step": {1: 5e-4, 32: 8e-4}, "verify": {1: 10e-3, 32: 10.5e-3, 128: 13e-3}}
"""Of the cost-aware rule: some requests of a batch go on, some leave a candidate out, by what the others score."""


def _check_engine(tiny: Any, reference: Any, monkeypatch: Any, name: str, num_samples: int) -> None:
    from vllm import SamplingParams

    law = joint_law(reference("small_target").model, PROMPT, LENGTH, 1.0)
    config = {
        "method": "specdecpp", "model": tiny.small_draft, "rule": "confidence", "threshold": 0.8,
        "num_speculative_tokens": 3, "trace_rounds": 100_000, **CASES[name],
    }  # fmt: skip
    common: dict[str, Any] = {"temperature": 1.0, "max_tokens": LENGTH + 3, "ignore_eos": True, "detokenize": False}
    options = {"async_scheduling": True} if "asynchronous" in name else {}
    with harness.engine(
        tiny.small_target, config, max_model_len=64, max_num_seqs=32, max_num_batched_tokens=512, **options
    ) as llm:
        if "cost-aware" in name:
            v2_harness.fix_costs(llm, CURVES)
        speculator = v2_harness.speculator_of(llm)
        if speculator.runs is not None:
            quicker_runs(speculator.runs)
        draft = reference("small_draft") if config["draft_sample_method"] == "probabilistic" else None
        seen = Verified(monkeypatch, llm, reference("small_target"), draft)
        np.random.seed(11)  # vLLM's seeds of requests that bring none
        params = [SamplingParams(seed=i if i % 4 == 0 else None, **common) for i in range(num_samples)]
        outputs = llm.generate([{"prompt_token_ids": PROMPT}] * num_samples, params, use_tqdm=False)
        rounds = harness.take_rounds(llm)
    if draft is not None:
        seen.check_drawn()
    assert len({len(r["candidates"]) for r in rounds}) >= 3
    candidates, accepted = sum(len(r["candidates"]) for r in rounds), sum(r["accepted"] for r in rounds)
    assert 0.1 < accepted / candidates < 0.95  # both branches of the rejection sampler are used
    assert p_value([tuple(t[:LENGTH]) for t in harness.token_ids(outputs)], law) > FAILS_BELOW


@pytest.fixture(autouse=True)
def costs_are_known(monkeypatch):
    monkeypatch.setattr(timing, "measure", lambda *args: CURVES)


def test_sampled_output_follows_the_exact_law(tiny, reference, monkeypatch):
    """A few samples through the whole engine, and all that was verified; many more, and every kind, are in the slow
    test."""
    async_on_cpu.allow(monkeypatch)
    _check_engine(tiny, reference, monkeypatch, "cost-aware, asynchronous", 48)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_sampled_output_follows_the_exact_law_closely(tiny, reference, monkeypatch, name):
    async_on_cpu.allow(monkeypatch)
    _check_engine(tiny, reference, monkeypatch, name, 640)


def test_room_beyond_a_draft_is_masked_for_verification_alone():
    """Rows beyond what a request submitted are invalid, whatever the caller has found invalid already."""
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

    from vllm_specdecpp.engine.v2.sampler import end_of_draft_sampler

    plain = RejectionSampler.__new__(RejectionSampler)
    submitted = torch.tensor([9, 2, 0, 3], dtype=torch.int32)  # by request state
    ours: Any = end_of_draft_sampler(plain, submitted)
    seen: list[Any] = []
    batch = types.SimpleNamespace(
        expanded_idx_mapping=torch.tensor([3, 3, 3, 3, 3, 1, 1, 1, 1, 2, 2]),
        expanded_local_pos=torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1], dtype=torch.int32),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RejectionSampler, "__call__", lambda self, *args: seen.append(args))
        ours("logits", batch, "draft logits")
        grammar = torch.zeros(11, dtype=torch.bool)
        grammar[2] = True
        ours("logits", batch, "draft logits", grammar)
    beyond = [False] * 4 + [True] + [False] * 3 + [True, False, True]
    assert seen[0][3].tolist() == beyond
    assert seen[1][3].tolist() == [b or i == 2 for i, b in enumerate(beyond)]
    plain.enable_adaptive_verification = True  # as vLLM's warm-up sets it
    assert ours.enable_adaptive_verification is True


def test_a_rejection_sampler_of_another_kind_is_refused():
    from vllm_specdecpp.engine.v2.sampler import end_of_draft_sampler

    with pytest.raises(ValueError, match="^specdecpp: .*SimpleNamespace.*VLLM_USE_V2_MODEL_RUNNER=0$"):
        end_of_draft_sampler(types.SimpleNamespace(), torch.zeros(1))
