# SPDX-License-Identifier: Apache-2.0
"""Tokens are compared, not sizes; and the draft's logits get the target's width."""

from __future__ import annotations

import os
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_specdecpp.engine.shared import vocabulary

TOKENS = {"a": 0, "b": 1, "c": 2}


def difference(target: dict[str, int], draft: dict[str, int], added: str = "", num_rows: int = 8) -> Any:
    return vocabulary.difference(target, draft, frozenset(added.split()), num_rows)


def test_the_same_tokens_do_not_differ():
    assert difference(TOKENS, dict(TOKENS)) is None


@pytest.mark.parametrize(
    ("draft", "num", "words"),
    [
        ({"b": 0, "a": 1, "c": 2}, 2, "'a' is id 0 in the target's, id 1 in the draft's"),
        ({"a": 0, "b": 1}, 1, "'c' is id 2 in the target's, no token in the draft's"),
        ({**TOKENS, "d": 3}, 1, "'d' is no token in the target's, id 3 in the draft's"),
    ],
)
def test_the_first_token_that_differs_is_named(draft, num, words):
    assert difference(TOKENS, draft) == (num, words)


def test_added_tokens_may_differ():
    """A fine-tuned target has tokens of its own, and renames reserved ones."""
    assert difference({**TOKENS, "<pad>": 3, "<x>": 4}, {**TOKENS, "<reserved>": 3}, "<pad> <x> <reserved>") is None


def test_every_other_token_needs_a_row_in_both():
    assert difference(TOKENS, dict(TOKENS), num_rows=3) is None
    assert difference(TOKENS, dict(TOKENS), num_rows=2) == (1, "'c' is id 2, and one of the models has 2 rows only")
    assert difference({**TOKENS, "<x>": 9}, TOKENS, "<x>", num_rows=3) is None


def model_config(size: int, **options: Any) -> Any:
    common = {"tokenizer_revision": None, "revision": None, "runner_type": "generate", "tokenizer_mode": "auto"}
    flags = {"skip_tokenizer_init": False, "trust_remote_code": False}
    return SimpleNamespace(**{**common, **flags, **options}, get_vocab_size=lambda: size)


@pytest.mark.parametrize("skip", [True, False], ids=["skip_tokenizer_init", "missing files"])
def test_without_tokenizers_the_sizes_decide(monkeypatch, tmp_path, skip):
    nowhere = {"tokenizer": str(tmp_path), "model": str(tmp_path), "skip_tokenizer_init": skip}
    vocabulary.check(model_config(512, **nowhere), model_config(512, **nowhere))
    with pytest.raises(ValueError, match="512 rows, the draft's 500.*choose a draft model of the target's family"):
        vocabulary.check(model_config(512, **nowhere), model_config(500, **nowhere))


def test_tokenizers_on_disk_are_compared(tiny, tmp_path):
    """Of the same size: other tokens are refused. Of another: the same tokens are taken."""
    from transformers import AutoTokenizer

    ours = {"tokenizer": tiny.target, "model": tiny.draft_good}
    vocabulary.check(model_config(512, **ours), model_config(512, **ours))
    vocabulary.check(model_config(536, **ours), model_config(512, **ours))
    vocabulary.check(model_config(512, **ours), model_config(536, **ours))
    with pytest.raises(ValueError, match="12 differ, e.g. .* is id 500, and one of the models has 500 rows only"):
        vocabulary.check(model_config(512, **ours), model_config(500, **ours))
    texts = ["the quick brown fox jumps over the lazy dog " * 9]
    AutoTokenizer.from_pretrained(tiny.target).train_new_from_iterator(texts, 512).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="^the draft has other tokens than the target: .*; choose a draft model"):
        vocabulary.check(model_config(512, **ours), model_config(512, **{**ours, "model": str(tmp_path)}))


def test_tokenizers_that_agreed_are_compared_again_once_a_file_changed(tiny, tmp_path, monkeypatch):
    draft = shutil.copytree(tiny.draft_good, tmp_path / "draft")
    pair = model_config(512, tokenizer=tiny.target, model=str(draft))
    read = []
    original = vocabulary._tokenizers

    def counted(*args):
        read.append(1)
        return original(*args)

    monkeypatch.setattr(vocabulary, "_tokenizers", counted)
    for change, times in ((None, 1), (None, 1), ("touched", 2), (None, 2), ("its own code", 3)):
        if change == "touched":
            os.utime(draft / "tokenizer.json", (1, 1))
        if change == "its own code":
            pair.trust_remote_code = True
        vocabulary.check(pair, pair)
        assert len(read) == times
    pair, other = model_config(512, tokenizer=tiny.target), model_config(500, model=str(draft))
    for _ in range(2):  # what differs is not remembered
        with pytest.raises(ValueError, match="12 differ"):
            vocabulary.check(pair, other)


class Model(torch.nn.Module):
    """Of [3, rows] logits that count up, and what its embedding is asked for."""

    def __init__(self, num_rows: int) -> None:
        super().__init__()
        self.num_rows = num_rows

    def compute_logits(self, hidden_states: torch.Tensor | None) -> torch.Tensor | None:
        return None if hidden_states is None else torch.arange(3.0 * self.num_rows).view(3, -1)

    def forward(self, input_ids: torch.Tensor | None) -> torch.Tensor | None:
        return input_ids


@pytest.mark.parametrize(("num_draft", "num_target"), [(5, 8), (8, 5), (5, 5)])
def test_logits_get_the_targets_width_and_ids_a_row(num_draft, num_target):
    model = Model(num_draft)
    vocabulary.fit(model, num_target, num_draft)
    logits, own, both = (
        model.compute_logits(torch.zeros(1)),
        torch.arange(3.0 * num_draft).view(3, -1),
        min(5, num_draft),
    )
    assert logits is not None and logits.shape == (3, num_target) and logits.is_contiguous()
    assert torch.equal(logits[:, :both], own[:, :both])
    assert bool((logits[:, num_draft:] == -torch.inf).all())
    assert model.compute_logits(None) is None  # ranks that get none
    input_ids = torch.tensor([0, num_draft - 1, num_target - 1])
    buffer = input_ids.clone()
    assert model(input_ids=buffer) is buffer  # in place
    assert buffer.tolist() == input_ids.clamp(max=num_draft - 1).tolist()
    assert model(input_ids=None) is None
