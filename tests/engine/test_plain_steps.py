# SPDX-License-Identifier: Apache-2.0
"""Steps without a candidate are sampled as without speculation: same tokens, same logprobs, no rejection sampler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests import engine_harness as harness
from vllm_specdecpp.engine.v1 import plain_steps

REQUESTS = 4
OFF = {"specdecpp": {"enabled": False}}
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "top_k": 6},  # without top-p vLLM's own path ends the engine here, where there is no Triton
    {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2, "min_tokens": 5},
]
IDS = ["greedy", "top_k", "top_p"]


def answers(llm: Any, sampling: dict[str, Any], extra_args: dict[str, Any] | None = None) -> list[Any]:
    """Token ids and logprobs of a few requests with seeds of their own."""
    from vllm import SamplingParams

    params = [
        SamplingParams(max_tokens=16, detokenize=False, ignore_eos=True, logprobs=2, seed=i, extra_args=extra_args,
                       **sampling)
        for i in range(REQUESTS)
    ]  # fmt: skip
    prompts: Any = [{"prompt_token_ids": p} for p in harness.prompts(REQUESTS, seed=11)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [(list(o.outputs[0].token_ids), logprobs(o.outputs[0].logprobs)) for o in outputs]


def logprobs(positions: Sequence[dict[int, Any]]) -> list[dict[int, float]]:
    return [{token: round(entry.logprob, 3) for token, entry in position.items()} for position in positions]


@pytest.fixture(scope="module")
def alone(tiny):
    """What vLLM answers without speculation."""
    with harness.engine(tiny.target) as llm:
        return [answers(llm, sampling) for sampling in SAMPLING]


@pytest.fixture(scope="module")
def llm(tiny, alone):
    config = {
        "method": "specdecpp", "model": tiny.draft_good, "rule": "fixed", "num_speculative_tokens": 3,
        "draft_sample_method": "probabilistic",
    }  # fmt: skip
    with harness.engine(tiny.target, config) as engine:
        yield engine


@pytest.fixture
def verifications(llm, monkeypatch):
    """Candidates in each call of vLLM's rejection sampler."""
    sampler = llm.llm_engine.model_executor.driver_worker.worker.model_runner.rejection_sampler
    forward, calls = sampler.forward, []

    def counted(metadata: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(sum(metadata.num_draft_tokens))
        return forward(metadata, *args, **kwargs)

    monkeypatch.setattr(sampler, "forward", counted)
    return calls


@pytest.mark.parametrize("index", range(len(SAMPLING)), ids=IDS)
def test_requests_that_never_draft_are_answered_as_without_speculation(llm, alone, verifications, index):
    assert answers(llm, SAMPLING[index], OFF) == alone[index]
    assert verifications == []


def test_candidates_go_to_the_rejection_sampler(llm, verifications):
    """The control of the test above: every round that drafts is verified there, and prefills are not."""
    answers(llm, SAMPLING[1])
    assert verifications and min(verifications) > 0


def test_a_second_call_does_not_wrap_twice():
    class Runner:
        def _sample(self, logits: Any, spec_decode_metadata: Any) -> Any:
            return spec_decode_metadata

    class Metadata:
        def __init__(self, *lengths: int):
            self.num_draft_tokens = list(lengths)

    runner = Runner()
    plain_steps.sample_plainly(runner)
    once = runner._sample
    plain_steps.sample_plainly(runner)
    assert once is not runner._sample and once.__closure__ is not None
    inner = [cell.cell_contents for cell in runner._sample.__closure__ or ()]
    assert inner == [Runner._sample.__get__(runner)]
    drafted = Metadata(0, 2)
    assert runner._sample(torch.zeros(4), drafted) is drafted
    assert runner._sample(torch.zeros(2), Metadata(0, 0)) is None
    assert runner._sample(torch.zeros(2), None) is None
