# SPDX-License-Identifier: Apache-2.0
"""Output layers of different widths on Model Runner V2: V1's tests on the other runner, and what is verified."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import engine_harness as harness
from tests.engine import test_vocabulary as v1
from tests.reference_loop import GreedyModel
from tests.tiny_models import SMALL_VOCAB_SIZE
from tests.v2.verified import Verified

same_tokens = v1.same_tokens
wider = v1.wider
test_greedy_output_is_unchanged = v1.test_greedy_output_is_unchanged


def _reference(folder: str) -> GreedyModel:
    from transformers import AutoModelForCausalLM

    return GreedyModel(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


@pytest.mark.parametrize("which", ["target wider", "draft wider"])
@pytest.mark.asks(8)
def test_probabilities_are_compared_row_by_row(tiny, wider, monkeypatch, which):
    """Of both models, as a candidate that either one alone has a row for can be drawn or is impossible."""
    target, draft = v1._pair(tiny, wider, which, "small_")
    config = {
        "method": "specdecpp", "model": draft, "rule": "confidence", "num_speculative_tokens": 4,
        "draft_sample_method": "probabilistic",
    }  # fmt: skip
    options: dict[str, Any] = {"max_model_len": 64, "max_num_seqs": 6, "max_num_batched_tokens": 128}
    prompts = harness.prompts(6, seed=4, longest=9, vocab=SMALL_VOCAB_SIZE)
    with harness.engine(target, config, **options) as llm:
        verified = Verified(monkeypatch, llm, _reference(target), _reference(draft))
        outputs = harness.generate(llm, prompts, max_tokens=12, ignore_eos=True, temperature=1.0)
        assert llm.collective_rpc("specdecpp_stats")[0]["accepted"] > 0
    verified.check_drawn()
    emitted = {token for tokens in harness.token_ids(outputs) for token in tokens}
    assert (max(emitted) >= SMALL_VOCAB_SIZE) is (which == "target wider")


@pytest.mark.slow
@pytest.mark.parametrize("which", ["target wider", "draft wider"])
def test_sampled_output_keeps_its_law(tiny, wider, which):
    """Of the second token alone, which is a round's first candidate: few samples are enough for that."""
    v1.check_law(tiny, wider, which, 96, slice(1, 2))
