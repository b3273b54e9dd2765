# SPDX-License-Identifier: Apache-2.0
"""A tiny draft that proposes some token ids only: the engine's folder, and the oracle's model."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.reference_loop import GreedyModel
from tests.tiny_models import EOS, VOCAB_SIZE

TOKEN_IDS = sorted({EOS, *random.Random(5).sample(range(VOCAB_SIZE), 300)})
"""Of the tiny drafts: more than half of their ids."""
SMALL_TOKEN_IDS = [1, 2, 4, 5, 7]


def save(source: str, folder: Path, token_ids: Sequence[int] = TOKEN_IDS) -> str:
    """``source`` with the file that names ``token_ids``, in ``folder``."""
    shutil.copytree(source, folder)
    save_file({"d2t": torch.tensor(token_ids)}, folder / "draft_vocab.safetensors")
    with safe_open(folder / "model.safetensors", "pt") as weights:
        where = dict.fromkeys(weights.keys(), "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return str(folder)


def oracle(source: str, token_ids: Sequence[int] = TOKEN_IDS) -> GreedyModel:
    """The same draft for :mod:`tests.reference_loop`."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    mask = torch.full((model.config.vocab_size,), -1e9)  # its 0 · log 0 is 0
    mask[list(token_ids)] = 0.0
    model.lm_head.register_forward_hook(lambda _, inputs, logits: logits + mask)
    return GreedyModel(model)
