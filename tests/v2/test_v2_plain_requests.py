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
test_at_k_0_no_draft_pass_is_run = v1.test_at_k_0_no_draft_pass_is_run


@pytest.mark.slow
def test_sampled_answers_follow_the_exact_law(tiny, reference, monkeypatch):
    monkeypatch.setattr(v1, "NUM_SAMPLES", 32)
    v1.test_sampled_answers_follow_the_exact_law(tiny, reference)


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


@pytest.mark.asks(5)
def test_answers_are_those_without_speculation(tiny, monkeypatch):
    """Greedy, and with seeds, for which a request's text does not depend on what is drafted. Custom processors are
    applied to candidates; at temperature 0 ``min_p`` changes nothing, so vLLM drops it."""
    kinds = {**v1.KINDS, "logit_bias": {"logit_bias": {3: 15.0}}, "even": {"extra_args": {"even": 1}}}
    monkeypatch.setattr(v1, "KINDS", kinds)
    prompts = harness.prompts(2, seed=5)
    samplings: list[dict[str, Any]] = [{"temperature": 0.0, "max_tokens": 10}, {"seed": 7, "max_tokens": 10}]
    with harness.engine(tiny.target, logits_processors=[NoOddToken]) as llm:
        wanted = [harness.token_ids(v1._run(llm, prompts, **sampling)) for sampling in samplings]
    with harness.engine(tiny.target, v1._config(tiny, "draft_good"), logits_processors=[NoOddToken]) as llm:
        for sampling, answers, may_draft in zip(samplings, wanted, [(1, 1, 0, 1), (1, 0, 0, 1)], strict=True):
            outputs = v1._run(llm, prompts, **sampling)
            v1._check_lengths(llm, outputs, tuple(map(bool, may_draft)))
            assert harness.token_ids(outputs) == answers, sampling
    plain, min_p, biased, even = ([answers[index::4] for answers in wanted] for index in range(4))
    assert plain[0] == min_p[0] and plain[1] != min_p[1] and plain[0] != biased[0] and plain[1] != biased[1]
    for answers in even:
        assert not any(token % 2 for answer in answers for token in answer)
    for answers in plain:
        assert any(token % 2 for answer in answers for token in answer)
