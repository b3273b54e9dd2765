# SPDX-License-Identifier: Apache-2.0
"""What vLLM refuses with speculation, on Model Runner V2; and custom logits processors, which V2 can serve."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

from tests import engine_harness as harness
from tests.engine import test_plain_requests as v1

test_nothing_else_that_vllm_refuses_slips_through = v1.test_nothing_else_that_vllm_refuses_slips_through
test_greedy_answers_are_those_without_speculation = v1.test_greedy_answers_are_those_without_speculation
test_at_k_0_no_draft_pass_is_run = v1.test_at_k_0_no_draft_pass_is_run
test_sampled_answers_follow_the_exact_law = v1.test_sampled_answers_follow_the_exact_law


@pytest.fixture(autouse=True)
def fewer_samples(monkeypatch):
    monkeypatch.setattr(v1, "NUM_SAMPLES", 32)


class NoOddToken(LogitsProcessor):
    """Forbids odd tokens to requests that say so, at every row of theirs."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self.asked = torch.zeros(req_states.max_num_reqs, dtype=torch.bool)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        self.asked[req_idx] = bool((sampling_params.extra_args or {}).get("even"))
        return bool(self.asked[req_idx])

    def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
        rows = self.asked[ctx.expanded_idx_mapping.long()].nonzero().squeeze(1)
        logits[rows[:, None], torch.arange(1, logits.shape[1], 2)] = -torch.inf
        return logits


def test_custom_logits_processors_are_applied_to_candidates(tiny, monkeypatch):
    monkeypatch.setattr(v1, "KINDS", {"plain": {}, "even": {"extra_args": {"even": 1}}})
    prompts = harness.prompts(3, seed=5)
    with harness.engine(tiny.target, logits_processors=[NoOddToken]) as llm:
        wanted = harness.token_ids(v1._run(llm, prompts, temperature=0.0))
    with harness.engine(tiny.target, v1._config(tiny, "draft_good"), logits_processors=[NoOddToken]) as llm:
        outputs = v1._run(llm, prompts, temperature=0.0)
        rounds = harness.rounds_of(outputs, harness.take_rounds(llm))
    assert harness.token_ids(outputs) == wanted
    assert not any(token % 2 for answer in wanted[1::2] for token in answer)
    assert any(token % 2 for answer in wanted[::2] for token in answer)
    assert all(any(len(candidates) > 1 for candidates, *_ in request) for request in rounds)
