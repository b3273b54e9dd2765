# SPDX-License-Identifier: Apache-2.0
"""Steps without a candidate are sampled as without speculation: same tokens, same logprobs, no rejection sampler."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests import engine_harness as harness
from vllm_specdecpp.engine.v1 import plain_steps

REQUESTS = 4
OFF = {"specdecpp": {"enabled": False}}
THINK = " the"  # one token; the end of a thought is two, and every other prompt starts one
ENGINE: dict[str, Any] = {"skip_tokenizer_init": False, "max_num_batched_tokens": 40}
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "top_k": 6},  # without top-p vLLM's own path ends the engine here, where there is no Triton
    {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2, "min_tokens": 5},
]
IDS = ["greedy", "top_k", "top_p"]
MIXED: list[dict[str, Any]] = [
    {},
    {"thinking_token_budget": 0},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "thinking_token_budget": 3},
    {"bad_words": ["e", "s", " the", "in"]},
    {"min_tokens": 8, "ignore_eos": False},
    {"thinking_token_budget": 5, "logprobs": 2},
    {"allowed_token_ids": list(range(3, 200))},
    {"thinking_token_budget": 1},
    {"thinking_token_budget": 100},
]
"""What the sampler must keep apart by request: greedy requests of one batch."""


def answers(llm: Any, sampling: dict[str, Any], extra_args: dict[str, Any] | None = None) -> list[Any]:
    """Token ids and logprobs of a few requests with seeds of their own (prompts in chunks: vLLM's CPU build ends)."""
    from vllm import SamplingParams

    params = [
        SamplingParams(max_tokens=16, detokenize=False, ignore_eos=True, logprobs=2, seed=i, extra_args=extra_args,
                       **sampling)
        for i in range(REQUESTS)
    ]  # fmt: skip
    prompts: Any = [{"prompt_token_ids": p} for p in harness.prompts(REQUESTS, seed=11, longest=10)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [(list(o.outputs[0].token_ids), logprobs(o.outputs[0].logprobs)) for o in outputs]


def mixed_answers(llm: Any, extra_args: dict[str, Any] | None = None) -> list[list[int]]:
    """Token ids of ``MIXED``, twice over: with prompts inside a thought, and with others; most are read in chunks."""
    from vllm import SamplingParams

    (start,) = llm.get_tokenizer().encode(THINK, add_special_tokens=False)
    prompts: Any = [
        {"prompt_token_ids": [p[0], start, *p[1:]] if index < len(MIXED) else p}
        for index, p in enumerate(harness.prompts(2 * len(MIXED), seed=12))
    ]
    common: dict[str, Any] = {"temperature": 0.0, "max_tokens": 20, "detokenize": False, "ignore_eos": True}
    params = [SamplingParams(**{**common, "extra_args": extra_args, **kind}) for kind in MIXED + MIXED]
    return harness.token_ids(llm.generate(prompts, params, use_tqdm=False))


def reasoning() -> Any:
    from vllm.config.reasoning import ReasoningConfig

    return ReasoningConfig(reasoning_start_str=THINK, reasoning_end_str="in the")


def logprobs(positions: Sequence[dict[int, Any]]) -> list[dict[int, float]]:
    return [{token: round(entry.logprob, 3) for token, entry in position.items()} for position in positions]


@pytest.fixture(scope="module")
def alone(tiny):
    """What vLLM answers without speculation."""
    with harness.engine(tiny.target, reasoning_config=reasoning(), **ENGINE) as llm:
        return [answers(llm, sampling) for sampling in SAMPLING], mixed_answers(llm)


@pytest.fixture(scope="module")
def llm(tiny, alone):
    config = {
        "method": "specdecpp", "model": tiny.draft_good, "rule": "fixed", "num_speculative_tokens": 3,
        "draft_sample_method": "probabilistic",
    }  # fmt: skip
    with harness.engine(tiny.target, config, reasoning_config=reasoning(), **ENGINE) as engine:
        yield engine


@pytest.fixture
def verifications(llm, monkeypatch):
    """Candidates in each call of vLLM's rejection sampler."""
    sampler = harness.runner(llm).rejection_sampler
    forward, calls = sampler.forward, []

    def counted(metadata: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(sum(metadata.num_draft_tokens))
        return forward(metadata, *args, **kwargs)

    monkeypatch.setattr(sampler, "forward", counted)
    return calls


@pytest.mark.parametrize("index", range(len(SAMPLING)), ids=IDS)
def test_requests_that_never_draft_are_answered_as_without_speculation(llm, alone, verifications, index):
    assert answers(llm, SAMPLING[index], OFF) == alone[0][index]
    assert verifications == []


@pytest.mark.parametrize("extra_args", [OFF, None], ids=["off", "drafting"])
def test_one_requests_options_change_no_other_request(llm, alone, extra_args):
    assert mixed_answers(llm, extra_args) == alone[1]
    forced = alone[1][MIXED.index({"thinking_token_budget": 0})]
    assert forced[:2] == llm.get_tokenizer().encode("in the", add_special_tokens=False)


def test_candidates_go_to_the_rejection_sampler(llm, verifications):
    """The control of the test above: every round that drafts is verified there, and prefills are not."""
    answers(llm, SAMPLING[1])
    assert verifications and min(verifications) > 0


class Runner:
    """What is read of a ``GPUModelRunner``; each call says which sampler it reached."""

    def __init__(self) -> None:
        self.input_batch = SimpleNamespace(
            sampling_metadata="metadata", num_reqs=2, thinking_budget_state_holder=None,
            update_async_output_token_ids=lambda: None,
        )  # fmt: skip
        self.discard_request_mask = SimpleNamespace(np=np.array([False, False]))

    def sampler(self, **kwargs: Any) -> tuple[str, bool]:
        return "plain", kwargs["predict_bonus_token"]

    def _sample(self, logits: Any, spec_decode_metadata: Any) -> Any:
        return "rejection"


@pytest.mark.parametrize(
    ("lengths", "wanted"), [((0, 2), "rejection"), ((0, 0), ("plain", True)), (None, ("plain", True))]
)
def test_steps_with_a_candidate_alone_are_vllms(lengths, wanted):
    runner = Runner()
    plain_steps.sample_plainly(runner)
    metadata = None if lengths is None else SimpleNamespace(num_draft_tokens=list(lengths))
    assert runner._sample(None, metadata) == wanted


def test_a_second_call_does_not_wrap_twice():
    runner = Runner()
    plain_steps.sample_plainly(runner)
    plain_steps.sample_plainly(runner)
    assert Runner._sample.__get__(runner) in [cell.cell_contents for cell in runner._sample.__closure__ or ()]
