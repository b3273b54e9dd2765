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
    test_sampled_output_keeps_its_law,
    test_the_engine_is_whole_again,
    test_the_law_catches_wrong_probabilities,
)

__all__ = [
    "expected",
    "llm",
    "sampling_llm",
    "test_rounds_catch_a_wrong_map_and_output_does_not",
    "test_rounds_equal_the_reference",
    "test_sampled_output_keeps_its_law",
    "test_the_engine_is_whole_again",
    "test_the_law_catches_wrong_probabilities",
]


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    """Of the second token alone, which is a round's first candidate: few samples are enough for that."""
    monkeypatch.setattr(on_v1, "NUM_SAMPLES", 96)
    monkeypatch.setattr(on_v1, "OF_TOKENS", slice(1, 2))
