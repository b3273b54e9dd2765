# SPDX-License-Identifier: Apache-2.0
"""The same seed gives the same text as without speculation, whatever was drafted; requests without one keep their law.

Model Runner V1; V2's tests are in ``tests/v2/test_v2_seeds.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import engine_harness as harness
from tests import same_text
from tests.exact_law import p_value
from tests.planted_bugs import after
from vllm_specdecpp.engine.v1.own_noise import OwnNoise, _SeededRows

MODES = ["raw_logprobs", "processed_logprobs"]


@pytest.fixture(scope="module")
def alone(tiny):
    """logprobs mode → what vLLM answers without speculation."""
    found = {}
    for mode in MODES:
        with harness.engine(tiny.target, logprobs_mode=mode) as llm:
            found[mode] = same_text.answers(llm)
    return found


@pytest.mark.parametrize(
    ("drafts", "mode"), [("greedy", MODES[0]), ("probabilistic", MODES[0]), ("probabilistic", MODES[1])]
)
def test_the_text_is_that_without_speculation(tiny, alone, monkeypatch, drafts, mode):
    llm = harness.kept(tiny.target, same_text.config(tiny, drafts), logprobs_mode=mode)
    for lengths in (1, 2):
        with monkeypatch.context() as patch:
            same_text.random_lengths(patch, harness.proposer(llm), lengths)
            assert same_text.answers(llm) == alone[mode]
            same_text.check_used(harness.take_rounds(llm))


def test_the_text_is_the_same_with_free_runs(tiny, alone):
    """The rule as it is by default: lengths go by measured time."""
    config = same_text.config(tiny, "probabilistic", rule="cost_aware")
    llm = harness.kept(tiny.target, config)
    harness.set_costs(llm, {"first": {1: 1e-4}, "step": {1: 1e-4}, "verify": {1: 1e-2, 64: 1.1e-2}})
    assert same_text.answers(llm) == alone[MODES[0]]
    assert sum(len(r["candidates"]) for r in harness.take_rounds(llm)) > 50


def _not_put_back(patch: Any) -> None:
    """The generator stays where the round's last draw left it."""
    after(patch, _SeededRows, "draw", lambda self, *_: [s.append(s[-1]) for s in self.states.values()])


def _one_row_on(patch: Any) -> None:
    """Each row draws with the noise of the next."""
    after(patch, _SeededRows, "rewind", lambda self: [torch.rand(1, generator=g) for g in self.generators.values()])


def _as_vllm_does(patch: Any) -> None:
    patch.setattr(OwnNoise, "forward", OwnNoise.__mro__[1].forward)


BUGS = [_not_put_back, _one_row_on, _as_vllm_does]


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_changes_the_text(tiny, alone, monkeypatch, bug):
    llm = harness.kept(tiny.target, same_text.config(tiny, "greedy"))
    bug(monkeypatch)
    same_text.random_lengths(monkeypatch, harness.proposer(llm), 1)
    assert same_text.answers(llm) != alone[MODES[0]]


def test_requests_with_and_without_seeds_follow_the_law(tiny, law):
    """In one batch; a seed of its own for every other request."""
    from vllm import SamplingParams

    prompt, length = [3, 5, 4, 7, 6], 4
    common: dict[str, Any] = {"max_tokens": length + 2, "ignore_eos": True, "detokenize": False, "temperature": 0.9}
    params = [SamplingParams(seed=None if i % 2 else i, **common) for i in range(2048)]
    config = same_text.config(tiny, "probabilistic") | {"model": tiny.small_draft}
    torch.manual_seed(5)
    with harness.engine(tiny.small_target, config, **harness.SMALL) as llm:
        outputs = llm.generate([{"prompt_token_ids": prompt}] * len(params), params, use_tqdm=False)
    tokens = [tuple(t[:length]) for t in harness.token_ids(outputs)]
    for half in (tokens[::2], tokens[1::2]):
        assert p_value(half, law(prompt, length, 0.9)) > 1e-4
