# SPDX-License-Identifier: Apache-2.0
"""The same seed gives the same text as without speculation on Model Runner V2, whatever was drafted."""

from __future__ import annotations

import pytest

from tests import engine_harness as harness
from tests import same_text
from tests.planted_bugs import change_arguments
from tests.v2 import async_on_cpu
from tests.v2.harness import speculator_of
from vllm_specdecpp.engine.v2 import sampler
from vllm_specdecpp.engine.v2.sampler import EndOfDraftSampler

SIZE = 1, 8
"""Of each kind of request one, and tokens."""


@pytest.fixture(scope="module")
def alone(tiny):
    """What vLLM answers without speculation."""
    with harness.engine(tiny.target) as llm:
        return same_text.answers(llm, *SIZE)


@pytest.fixture(params=[pytest.param("greedy", marks=pytest.mark.slow), "probabilistic, asynchronous"])
def llm(request, tiny, monkeypatch):
    options = {}
    if "asynchronous" in request.param:
        async_on_cpu.allow(monkeypatch)
        options["async_scheduling"] = True
    config = same_text.config(tiny, request.param.split(",")[0])
    with harness.engine(tiny.target, config, **options) as llm:
        yield llm


def test_the_text_is_that_without_speculation(llm, alone, monkeypatch):
    same_text.random_lengths(monkeypatch, speculator_of(llm), 1)
    assert same_text.answers(llm, *SIZE) == alone
    same_text.check_used(harness.take_rounds(llm))
    with monkeypatch.context() as patch:  # noise of the wrong position
        shifted = lambda *args: (*args[:-1], args[-1] + 1)  # noqa: E731
        change_arguments(patch, sampler, "gumbel_sample", shifted)
        assert same_text.answers(llm, *SIZE) != alone
    monkeypatch.delattr(EndOfDraftSampler, "_verify")
    assert same_text.answers(llm, *SIZE) != alone
