# SPDX-License-Identifier: Apache-2.0
"""What vLLM can do besides plain decoding goes on working on Model Runner V2, draft KV and all."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests import engine_harness as harness
from tests.engine import test_features as v1
from tests.engine.test_plain_steps import THINK, reasoning

MAX_LENGTH = 6

# The same tests as V1's on the other runner; those that share an engine follow each other.
test_prefix_caching = v1.test_prefix_caching
test_one_row = v1.test_a_prompt_that_is_cached_but_for_one_token_costs_one_row
test_rounds_that_wait_for_room_are_counted = v1.test_rounds_that_wait_for_room_are_counted
test_near_max_model_len = v1.test_near_max_model_len
test_preemption = v1.test_preemption
test_dynamic_speculation = v1.test_dynamic_speculation


@pytest.fixture(autouse=True)
def fewer_prompts(monkeypatch):
    """Interpreted kernels take their time; three prompts are enough for more blocks than there are."""
    prompts = harness.prompts
    monkeypatch.setattr(harness, "prompts", lambda num, **kwargs: prompts(num if num < 8 else num * 3 // 8, **kwargs))


def _sampling() -> dict[str, Any]:
    """One request of each kind: they share batches."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    kinds: dict[str, dict[str, Any]] = {
        "plain": {"ignore_eos": True},
        "stops at EOS": {},
        "repetition penalty": {"repetition_penalty": 1.3, "ignore_eos": True},
        "presence and frequency penalty": {"presence_penalty": 0.8, "frequency_penalty": 0.5, "ignore_eos": True},
        "allowed tokens": {"allowed_token_ids": list(range(3, 200)), "ignore_eos": True},
        "minimum length": {"min_tokens": 10},
        "stop tokens": {"stop_token_ids": list(range(40, 80))},
        "stop strings": {"stop": ["e", "\n"], "detokenize": True, "ignore_eos": True},
        "bad words": {"bad_words": ["e", "s", " the", "in"], "ignore_eos": True},
        "log-probabilities": {"logprobs": 3, "ignore_eos": True},
        "choice": {"structured_outputs": StructuredOutputsParams(choice=["accepted", "rejected", "recovered"])},
        "regex": {"structured_outputs": StructuredOutputsParams(regex=r"[0-9]{3}-[a-f]{4,9}\.")},
        "JSON schema": {"structured_outputs": StructuredOutputsParams(json=json.dumps(v1.SCHEMA))},
        "two tokens": {"max_tokens": 2, "ignore_eos": True},
        "switched off": {"ignore_eos": True, "extra_args": {"specdecpp": {"enabled": False}}},
        "thinking budget 0": {"thinking_token_budget": 0, "ignore_eos": True},
        "thinking budget 5": {"thinking_token_budget": 5, "ignore_eos": True},
        "capped": {"ignore_eos": True, "extra_args": {"specdecpp": {"num_speculative_tokens": 2}}},
    }
    common = {"temperature": 0.0, "max_tokens": 16, "detokenize": False}
    return {name: SamplingParams(**{**common, **kind}) for name, kind in kinds.items()}


def _run(llm: Any) -> dict[str, Any]:
    sampling = _sampling()
    prompts = [{"prompt_token_ids": p} for p in harness.prompts(len(sampling), seed=8)]
    for prompt in prompts:
        prompt["prompt_token_ids"][:1] = llm.get_tokenizer().encode(THINK, add_special_tokens=False)
    outputs = llm.generate(prompts, list(sampling.values()), use_tqdm=False)
    return dict(zip(sampling, outputs, strict=True))


@pytest.fixture(scope="module")
def baseline(tiny):
    with harness.engine(tiny.target, skip_tokenizer_init=False, reasoning_config=reasoning()) as llm:
        return _run(llm)


@pytest.fixture(scope="module")
def speculative(tiny):
    """The same requests with our method, and each one's rounds."""
    config = {
        "method": "specdecpp", "model": tiny.draft_good, "rule": "confidence", "threshold": 0.8,
        "num_speculative_tokens": MAX_LENGTH, "trace_rounds": 100_000,
    }  # fmt: skip
    with harness.engine(tiny.target, config, skip_tokenizer_init=False, reasoning_config=reasoning()) as llm:
        outputs = _run(llm)
        rounds = harness.rounds_of(list(outputs.values()), harness.take_rounds(llm))
        return outputs, dict(zip(outputs, rounds, strict=True))


@pytest.mark.parametrize("name", list(_sampling()))
def test_sampling_features(baseline, speculative, name):
    mine, theirs = speculative[0][name].outputs[0], baseline[name].outputs[0]
    assert list(mine.token_ids) == list(theirs.token_ids)
    assert (mine.text, mine.finish_reason, mine.stop_reason) == (theirs.text, theirs.finish_reason, theirs.stop_reason)


@pytest.mark.asks(6)
def test_logprobs_are_the_targets(baseline, speculative):
    mine = speculative[0]["log-probabilities"].outputs[0].logprobs
    theirs = baseline["log-probabilities"].outputs[0].logprobs
    for a, b in zip(mine, theirs, strict=True):
        assert list(a) == list(b)
        assert [x.logprob for x in a.values()] == pytest.approx([x.logprob for x in b.values()], abs=1e-4)


@pytest.mark.asks(4)
def test_switches_of_one_request_hold(speculative):
    lengths = {name: [len(c) for c, *_ in rounds] for name, rounds in speculative[1].items()}
    assert set(lengths["switched off"]) == {0}
    assert max(lengths["capped"]) == 2
    assert max(lengths["plain"]) > 2
    assert sum(accepted for rounds in speculative[1].values() for _, accepted, _ in rounds) > 10
