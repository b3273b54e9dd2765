# SPDX-License-Identifier: Apache-2.0
"""Requests that vLLM refuses with speculation are served in the same batch as the others, at K = 0 and by their law."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from tests import engine_harness as harness
from tests.exact_law import joint_law, p_value

PROMPT = [3, 5, 4, 7, 6]
LAW_LENGTH = 3
FAILS_BELOW = 1e-4
"""p-value, as in ``test_lossless``."""
KINDS: dict[str, dict[str, Any]] = {
    "plain": {}, "min_p": {"min_p": 0.35}, "logit_bias": {"logit_bias": {3: 2.0, 5: -3.0}}
}  # fmt: skip
NUM_SAMPLES = 600
"""Of each kind."""


def _run(llm: Any, prompts: list[list[int]], **sampling: Any) -> list[Any]:
    """Each prompt with each kind, in one batch."""
    from vllm import SamplingParams

    common = {"max_tokens": 16, "ignore_eos": True, "detokenize": False, **sampling}
    params = [SamplingParams(**{**common, **kind}) for _ in prompts for kind in KINDS.values()]
    batch = [{"prompt_token_ids": p} for p in prompts for _ in KINDS]
    return llm.generate(batch, params, use_tqdm=False)


def _config(tiny: Any, draft: str, **options: Any) -> dict[str, Any]:
    return {
        "method": "specdecpp", "model": getattr(tiny, draft), "rule": "confidence", "threshold": 0.8,
        "num_speculative_tokens": 4, "trace_rounds": 100_000, **options,
    }  # fmt: skip


def _check_lengths(llm: Any, outputs: list[Any], may_draft: Sequence[bool] = (True, False, False)) -> None:
    lengths = [[len(c) for c, *_ in rounds] for rounds in harness.rounds_of(outputs, harness.take_rounds(llm))]
    longest = [max(map(max, lengths[i :: len(KINDS)])) for i in range(len(KINDS))]
    assert [n > 2 for n in longest] == list(may_draft) == [n > 0 for n in longest]


@pytest.mark.asks(5)
def test_greedy_answers_are_those_without_speculation(tiny, monkeypatch):
    monkeypatch.setitem(KINDS, "logit_bias", {"logit_bias": {3: 15.0}})
    prompts = harness.prompts(3, seed=5)
    with harness.engine(tiny.target) as llm:
        wanted = harness.token_ids(_run(llm, prompts, temperature=0.0))
    with harness.engine(tiny.target, _config(tiny, "draft_good")) as llm:
        outputs = _run(llm, prompts, temperature=0.0)
        _check_lengths(llm, outputs, (True, True, False))  # min_p changes nothing at temperature 0: vLLM drops it
    assert harness.token_ids(outputs) == wanted
    assert wanted[0] != wanted[2]  # the bias tells


@pytest.mark.asks(5)
def test_sampled_answers_follow_the_exact_law(tiny, reference):
    config = _config(tiny, "small_draft", draft_sample_method="probabilistic")
    with harness.engine(
        tiny.small_target, config, max_model_len=64, max_num_seqs=48, max_num_batched_tokens=1024
    ) as llm:
        torch.manual_seed(1)
        np.random.seed(1)  # V2's seeds
        outputs = _run(llm, [PROMPT] * NUM_SAMPLES, temperature=1.0, max_tokens=LAW_LENGTH + 2)
        _check_lengths(llm, outputs)
    samples = [tuple(t[:LAW_LENGTH]) for t in harness.token_ids(outputs)]
    laws = [joint_law(reference("small_target").model, PROMPT, LAW_LENGTH, 1.0, **kind) for kind in KINDS.values()]
    for index, law in enumerate(laws):
        assert p_value(samples[index :: len(KINDS)], law) > FAILS_BELOW, list(KINDS)[index]
    for law in laws[1:]:
        assert sum(abs(p - laws[0][tokens]) for tokens, p in law.items()) > 0.4  # of 2: the laws differ


@pytest.mark.parametrize(
    ("sampling", "word"),
    [({"logit_bias": {10**6: 1.0}}, "logit_bias"), ({"min_p": 0.1, "trace_decode_token_ids": [3, 4]}, "trace_decode")],
)
def test_nothing_else_that_vllm_refuses_slips_through(tiny, sampling, word):
    from vllm.exceptions import VLLMValidationError

    llm = harness.kept(tiny.target, _config(tiny, "draft_good"))
    with pytest.raises((ValueError, VLLMValidationError), match=word):
        harness.generate(llm, [PROMPT], **sampling)
    assert harness.generate(llm, [PROMPT])


@pytest.mark.asks(2)
def test_at_k_0_no_draft_pass_is_run(tiny):
    from vllm import SamplingParams

    kinds: list[dict[str, Any]] = [{"logit_bias": {3: 1.0}}, {"extra_args": {"specdecpp": "off"}}]
    common: dict[str, Any] = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, "detokenize": False}
    llm = harness.kept(tiny.target, _config(tiny, "draft_good"))
    llm.generate([{"prompt_token_ids": PROMPT}] * 2, [SamplingParams(**common, **k) for k in kinds], use_tqdm=False)
    stats = llm.collective_rpc("specdecpp_stats")[0]
    assert stats["draft_passes"] == 0 and stats["lengths"] == {0: 14}
