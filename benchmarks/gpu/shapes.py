# SPDX-License-Identifier: Apache-2.0
"""Model shapes without weights: vLLM's ``load_format="dummy"`` times any architecture that a config.json describes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

VOCAB = 128256
"""Llama 3's; draft and target share it."""


@dataclass(frozen=True)
class Shape:
    """A dense Llama of some size."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int

    def write(self, folder: Path, layers: int | None = None) -> str:
        """Write a model folder that vLLM can load with dummy weights; returns its path."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": self.hidden,
            "intermediate_size": self.intermediate, "num_hidden_layers": layers or self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "vocab_size": VOCAB,
            "head_dim": self.hidden // self.heads, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0, "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "bos_token_id": 1, "eos_token_id": 2,
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)


DRAFTS = {
    "0.5B": Shape(896, 4864, 24, 14, 2),
    "1B": Shape(2048, 8192, 16, 32, 8),
    "7B": Shape(4096, 11008, 32, 32, 32),
}
