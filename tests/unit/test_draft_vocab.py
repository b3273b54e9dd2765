# SPDX-License-Identifier: Apache-2.0
"""``draft_vocab.safetensors``: what is read of it, and what is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("vllm.transformers_utils.repo_utils")

from vllm_specdecpp.engine.shared import draft_vocab

IDS = torch.tensor([0, 2, 5, 7])


def config(folder: Path, **options: Any) -> Any:
    return SimpleNamespace(model=str(folder), revision=None, get_vocab_size=lambda: 8, **options)


def target(folder: Path, of_model: Any, generation: dict[str, Any]) -> Any:
    text_config = SimpleNamespace(eos_token_id=of_model)
    return config(folder, hf_text_config=text_config, try_get_generation_config=lambda: generation)


def write(folder: Path, index: bool = True, **tensors: torch.Tensor) -> Any:
    save_file(tensors, folder / "draft_vocab.safetensors")
    if index:
        (folder / "model.safetensors.index.json").write_text("{}")
    return config(folder)


def test_a_folder_without_the_file_drafts_from_all_ids(tmp_path, caplog):
    assert draft_vocab.read(config(tmp_path)) is None
    draft_vocab.check(target(tmp_path, 2, {}), config(tmp_path))
    assert not caplog.records


def test_the_ids_are_read_and_announced(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    draft = write(tmp_path, d2t=IDS)
    assert torch.equal(draft_vocab.read(draft), IDS)  # type: ignore[arg-type]
    draft_vocab.check(target(tmp_path, 2, {"eos_token_id": [5, 7]}), draft)
    assert caplog.messages == ["specdecpp: draft proposes 4 of 8 token ids (draft_vocab.safetensors)"]


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"d2t": IDS.int()}, "has d2t of int32 [4], not int64 [num_ids]"),
        ({"d2t": IDS.view(2, 2)}, "has d2t of int64 [2, 2], not int64 [num_ids]"),
        ({"d2t": IDS[:0]}, "has d2t of int64 [0], not int64 [num_ids]"),
        ({"d2t": IDS.flip(0)}, "must ascend, but 5 follows 7"),
        ({"d2t": torch.tensor([0, 2, 2])}, "must ascend, but 2 follows 2"),
        ({"d2t": IDS + 1}, "names token id 8, but the draft's vocabulary has 8 rows"),
        ({"d2t": IDS - 1}, "names token id -1, but the draft's vocabulary has 8 rows"),
        ({"t2d": IDS}, "holds ['t2d'], not 'd2t' alone"),
        ({"d2t": IDS, "index": False}, "would be loaded as weights by vLLM, as there is no model.safetensors.index"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, tensors, words):
    draft = write(tmp_path, **tensors)
    with pytest.raises(ValueError, match="^specdecpp: model=.*; shrink the draft for this target anew") as caught:
        draft_vocab.read(draft)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "draft_vocab.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="^specdecpp: model=.* cannot be read"):
        draft_vocab.read(config(tmp_path))


@pytest.mark.parametrize(
    ("of_model", "generation", "missing"),
    [(3, {}, "[3]"), (None, {"eos_token_id": 4}, "[4]"), ([2, 3], {"eos_token_id": [6, 7]}, "[3, 6]")],
)
def test_stop_tokens_must_be_among_the_ids(tmp_path, of_model, generation, missing):
    draft = write(tmp_path, d2t=IDS)
    with pytest.raises(ValueError, match="^specdecpp: .* stop tokens of the target") as caught:
        draft_vocab.check(target(tmp_path, of_model, generation), draft)
    assert f"lacks {missing}, " in str(caught.value)
