# SPDX-License-Identifier: Apache-2.0
"""What is emitted is what the target alone would emit: equal when greedy, equal in law when sampled."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests import engine_harness as harness
from tests.exact_law import p_value
from tests.reference_loop import answer
from tests.tiny_models import SMALL_VOCAB_SIZE

RULES: list[dict[str, Any]] = [
    {"rule": "fixed", "threshold": None},
    {"rule": "threshold", "threshold": 0.6},
    {"rule": "confidence", "threshold": 0.6},
    {"rule": "entropy", "threshold": 0.8},
]

NUM_SAMPLES = 2048
PROMPT = [3, 5, 4, 7, 6]
LAW_LENGTH = 4
"""Tokens whose joint law is tested: the first one, which is not speculative, and a round of up to three candidates."""
FAILS_BELOW = 1e-4
"""p-value. The seeds are fixed, so a passing case goes on passing; a planted bias lands below 1e-12."""


def test_greedy_output_is_unchanged(tiny, tmp_path, monkeypatch, reference):
    """By the bare word, with a bad draft; ``test_parity`` has a good one."""
    (tmp_path / "pairs.json").write_text(json.dumps({tiny.target: {"draft": tiny.draft_rand, "head": tiny.head}}))
    monkeypatch.setenv("SPECDECPP_PAIRS", str(tmp_path / "pairs.json"))
    prompts = harness.prompts(6, seed=3)
    baseline = [answer(reference("target"), prompt, 40) for prompt in prompts]
    with harness.engine(tiny.target, "specdecpp") as llm:
        for rule in RULES:
            harness.configure(llm, **rule)
            assert harness.token_ids(harness.generate(llm, prompts, ignore_eos=True)) == baseline, rule


@pytest.fixture(scope="module", params=["greedy", "probabilistic"])
def sampling_llm(request, tiny):
    """An engine on the small vocabulary, with one way to draw candidates."""
    config = {
        "method": "specdecpp", "model": tiny.small_draft, "head": tiny.head, "num_speculative_tokens": 5,
        "draft_sample_method": request.param, "trace_rounds": 100_000,
    }  # fmt: skip
    with harness.engine(tiny.small_target, config, **harness.SMALL) as llm:
        llm.draft_sample_method = request.param
        yield llm


def _samples(llm: Any, seed: int, **sampling: Any) -> list[tuple[int, ...]]:
    return harness.first_tokens(llm, PROMPT, NUM_SAMPLES, LAW_LENGTH, seed, n=256, **sampling)


@pytest.mark.parametrize(("rule", "temperature"), [(0, 0.7), (1, 1.0), (3, 0.7)], ids=["fixed", "threshold", "entropy"])
def test_sampled_output_follows_the_exact_law(sampling_llm, law, rule, temperature):
    """The other rule's is below: ``confidence``, at both temperatures."""
    harness.configure(sampling_llm, **RULES[rule])
    harness.take_rounds(sampling_llm)
    samples = _samples(sampling_llm, 1, temperature=temperature)
    rounds = harness.take_rounds(sampling_llm)
    assert 0.1 < harness.accepted_share(rounds) < 0.95
    if rule:
        assert len({len(r["candidates"]) for r in rounds}) >= 3
    assert p_value(samples, law(PROMPT, LAW_LENGTH, temperature)) > FAILS_BELOW


def test_sampled_output_follows_the_exact_law_with_top_k_and_top_p(sampling_llm, law):
    harness.configure(sampling_llm, **RULES[2])
    samples = _samples(sampling_llm, 2, temperature=0.7, top_k=5, top_p=0.9)
    assert p_value(samples, law(PROMPT, LAW_LENGTH, 0.7, 5, 0.9)) > FAILS_BELOW


def test_greedy_and_sampled_requests_share_a_batch(sampling_llm, law, reference):
    """Rows of different temperature keep their own law."""
    from vllm import SamplingParams

    harness.configure(sampling_llm, **RULES[2])
    harness.take_rounds(sampling_llm)
    torch.manual_seed(3)
    common: dict[str, Any] = {"max_tokens": LAW_LENGTH + 2, "ignore_eos": True, "detokenize": False}
    params = [SamplingParams(temperature=(0.0, 0.7, 1.0)[i % 3], **common) for i in range(3072)]
    outputs = sampling_llm.generate([{"prompt_token_ids": PROMPT}] * len(params), params, use_tqdm=False)
    rounds = harness.take_rounds(sampling_llm)
    assert 0.1 < harness.accepted_share(rounds) < 0.98 and len({len(r["candidates"]) for r in rounds}) >= 3
    tokens = [tuple(t[:LAW_LENGTH]) for t in harness.token_ids(outputs)]
    greedy: list[int] = []
    for _ in range(LAW_LENGTH):
        greedy.append(reference("small_target").steps([*PROMPT, *greedy])[0].token)
    assert set(tokens[::3]) == {tuple(greedy)}
    assert p_value(tokens[1::3], law(PROMPT, LAW_LENGTH, 0.7)) > FAILS_BELOW
    assert p_value(tokens[2::3], law(PROMPT, LAW_LENGTH, 1.0)) > FAILS_BELOW


def test_a_biased_stop_is_noticed(sampling_llm, law, monkeypatch):
    """The test's power: dropping a drawn candidate for its own low probability is biased, and must show."""
    if sampling_llm.draft_sample_method == "greedy":
        pytest.skip("a greedy candidate is a function of the prefix: every rule is exact")
    drafter = harness.proposer(sampling_llm)
    original = drafter.propose

    def biased(*args: Any, **kwargs: Any) -> list[list[int]]:
        drafts = original(*args, **kwargs)
        probs = drafter.take_last_draft_probs()  # [num_reqs, num_steps, vocab_size]
        kept = []
        for row, tokens in enumerate(drafts):
            unlikely = [probs[row, step, token] < 0.3 for step, token in enumerate(tokens)]
            kept.append(tokens[: unlikely.index(True)] if True in unlikely else tokens)
        return kept

    monkeypatch.setattr(drafter, "propose", biased)
    harness.configure(sampling_llm, **RULES[0])
    assert p_value(_samples(sampling_llm, 4, temperature=1.0), law(PROMPT, LAW_LENGTH, 1.0)) < 1e-12


def test_a_wrong_temperature_is_noticed(sampling_llm, law, monkeypatch):
    """What the unmended CPU sampler does, made repeatable: draft rows get a number that is not their temperature."""
    from vllm.triton_utils.dispatcher import register_kernels

    from vllm_specdecpp.engine.v1 import cpu_sampler

    harness.configure(sampling_llm, **RULES[0])
    register_kernels({cpu_sampler.KERNEL: lambda output_ptr, *_: output_ptr.fill_(3)})
    try:
        assert p_value(_samples(sampling_llm, 5, temperature=0.7), law(PROMPT, LAW_LENGTH, 0.7)) < 1e-12
    finally:
        register_kernels({cpu_sampler.KERNEL: cpu_sampler.expand})


def test_the_worker_has_mended_the_sampler(sampling_llm):
    """Fails if the Worker does not call ``cpu_sampler.apply``."""
    from vllm_specdecpp.engine.v1 import cpu_sampler

    assert not cpu_sampler.is_broken()


def test_vllm_still_needs_the_mend():
    """vLLM's own kernel loses float values; when this fails, the mend and its ledger entry can go."""
    from vllm.triton_utils.dispatcher import register_kernels
    from vllm.utils import cpu_triton_utils

    from vllm_specdecpp.engine.v1 import cpu_sampler

    register_kernels({cpu_sampler.KERNEL: cpu_triton_utils._expand_kernel_impl})
    try:
        assert cpu_sampler.is_broken()
        assert cpu_sampler.apply()
        assert not cpu_sampler.is_broken()
        assert not cpu_sampler.apply()  # a second call finds nothing to do
    finally:
        register_kernels({cpu_sampler.KERNEL: cpu_sampler.expand})


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64])
def test_expand_repeats_and_replaces(dtype):
    """The mended kernel through vLLM's own launcher, on ragged counts with zeros."""
    from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

    from vllm_specdecpp.engine.v1 import cpu_sampler

    cpu_sampler.apply()
    counts = torch.tensor([2, 0, 5, 1, 0, 3])
    values = torch.tensor([4, 0, 7, 9, 1, 0], dtype=dtype)
    expanded = expand_batch_to_tokens(values, counts.cumsum(0).int(), int(counts.sum()), replace_from=0, replace_to=1)
    assert expanded.dtype == dtype
    assert expanded.tolist() == torch.where(values == 0, 1, values).repeat_interleave(counts).tolist()


def test_exact_law_sums_to_one(law):
    """Guards the oracle itself."""
    for sampling in ((1.0, None, None), (0.7, 5, 0.9)):
        exact = law(PROMPT, LAW_LENGTH, *sampling)
        assert len(exact) == SMALL_VOCAB_SIZE**LAW_LENGTH
        assert sum(exact.values()) == pytest.approx(1.0, abs=1e-9)
