# SPDX-License-Identifier: Apache-2.0
"""Drafts cut to some token ids on Model Runner V2: V1's tests on the other runner, with fewer samples."""

from __future__ import annotations

import pytest

from tests.engine import test_draft_vocab as on_v1
from tests.engine.test_draft_vocab import (
    expected,
    llm,
    sampling_llm,
    test_rounds_catch_a_wrong_map_and_output_does_not,
    test_rounds_equal_the_reference,
    test_the_engine_is_whole_again,
    test_the_law_catches_wrong_probabilities,
)

__all__ = [
    "expected",
    "llm",
    "sampling_llm",
    "test_rounds_catch_a_wrong_map_and_output_does_not",
    "test_rounds_equal_the_reference",
    "test_the_engine_is_whole_again",
    "test_the_law_catches_wrong_probabilities",
]


@pytest.fixture(autouse=True, scope="module")
def fewer():
    """Of the second token alone, which is a round's first candidate, few samples are enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_v1, "NUM_SAMPLES", 64)
        patch.setattr(on_v1, "OF_TOKENS", slice(1, 2))
        patch.setattr(on_v1, "PROMPTS", on_v1.PROMPTS[:3])
        yield


@pytest.mark.parametrize("temperature", [0.7, pytest.param(1.0, marks=pytest.mark.slow)])
def test_sampled_output_keeps_its_law(sampling_llm, tiny, temperature):
    on_v1.test_sampled_output_keeps_its_law(sampling_llm, tiny, temperature)
