# SPDX-License-Identifier: Apache-2.0
"""Pairs whose output layers have different numbers of rows: the same tokens are padded, other tokens are refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import engine_harness as harness
from tests.exact_law import joint_law, p_value
from tests.reference_loop import GreedyModel, answer

MORE_ROWS = 24
MORE_SMALL_ROWS = 3
PROMPT, LAW_LENGTH = [3, 5, 4, 7, 6], 3
FAILS_BELOW = 1e-4
"""p-value. Seeds are fixed, so a passing case goes on passing."""


@pytest.fixture(scope="module")
def wider(tiny, tmp_path_factory):
    """name → folder of the checkpoint with more rows; the new ones are likely to be drawn."""
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("wider")
    for name in ("target", "draft_good", "small_target", "small_draft"):
        model = AutoModelForCausalLM.from_pretrained(getattr(tiny, name), dtype=torch.float32)
        num, more = model.config.vocab_size, MORE_SMALL_ROWS if name.startswith("small") else MORE_ROWS
        model.resize_token_embeddings(num + more, mean_resizing=False)
        with torch.no_grad():
            for weight in (model.lm_head.weight, model.model.embed_tokens.weight):
                weight[num:] = 1.05 * weight[3 : 3 + more]
        model.save_pretrained(root / name)
    return root


@pytest.fixture(autouse=True)
def same_tokens(monkeypatch):
    """As if tokenizers had been compared: the engines here have none."""
    from vllm_specdecpp.engine.shared import vocabulary

    monkeypatch.setattr(vocabulary, "_tokenizers", lambda *_: [({}, {}), ({}, {})])


def _pair(tiny: Any, wider: Path, which: str, prefix: str = "") -> tuple[str, str]:
    target, draft = (f"{prefix}target", f"{prefix}draft") if prefix else ("target", "draft_good")
    if which == "target wider":
        return str(wider / target), getattr(tiny, draft)
    return getattr(tiny, target), str(wider / draft)


@pytest.mark.parametrize("which", ["target wider", "draft wider"])
@pytest.mark.asks(8)
def test_greedy_output_is_unchanged(tiny, wider, which):
    from transformers import AutoModelForCausalLM

    target, draft = _pair(tiny, wider, which)
    prompts, max_tokens = harness.prompts(5, seed=3), 24
    alone = GreedyModel(AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32))
    expected = [answer(alone, prompt, max_tokens) for prompt in prompts]
    config = {"method": "specdecpp", "model": draft, "rule": "entropy", "num_speculative_tokens": 5}
    with harness.engine(target, config) as llm:
        for rule in ("entropy", "fixed"):
            harness.configure(llm, rule=rule)
            outputs = harness.generate(llm, prompts, ignore_eos=True, max_tokens=max_tokens)
            assert harness.token_ids(outputs) == expected, rule
            stats = llm.collective_rpc("specdecpp_stats", kwargs={"reset": True})[0]
            assert stats["accepted"] > 0.1 * stats["candidates"] > 0
    if which == "target wider":  # tokens that the draft has no row for were read
        assert any(token >= 512 for tokens in expected for token in tokens)


def check_law(tiny: Any, wider: Path, which: str, num_samples: int, of_tokens: slice) -> None:
    """Sampled tokens, counted by those of ``of_tokens``, follow the target's own law."""
    from transformers import AutoModelForCausalLM

    target, draft = _pair(tiny, wider, which, "small_")
    law: Counter[tuple[int, ...]] = Counter()
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    for tokens, probability in joint_law(model, PROMPT, LAW_LENGTH, 1.0).items():
        law[tokens[of_tokens]] += probability  # type: ignore[assignment]
    config = {
        "method": "specdecpp", "model": draft, "rule": "confidence", "num_speculative_tokens": 4,
        "draft_sample_method": "probabilistic",
    }  # fmt: skip
    options = {"max_model_len": 64, "max_num_seqs": 32, "max_num_batched_tokens": 512}
    with harness.engine(target, config, **options) as llm:
        torch.manual_seed(4)
        prompts = [PROMPT] * (num_samples // 32)
        outputs = harness.generate(llm, prompts, n=32, max_tokens=LAW_LENGTH + 1, ignore_eos=True, temperature=1.0)
        assert llm.collective_rpc("specdecpp_stats")[0]["accepted"] > 0
    samples = [tuple(c.token_ids[:LAW_LENGTH])[of_tokens] for o in outputs for c in o.outputs]
    assert p_value(samples, dict(law)) > FAILS_BELOW


@pytest.mark.parametrize("which", ["target wider", "draft wider"])
@pytest.mark.asks(8)
def test_sampled_output_keeps_its_law(tiny, wider, which):
    """Probabilities of the draft are compared with the target's row by row."""
    check_law(tiny, wider, which, 2048, slice(LAW_LENGTH))
