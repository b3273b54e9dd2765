# SPDX-License-Identifier: Apache-2.0
"""Tiny random Llama checkpoints, acceptance heads and a tokenizer for the tests; written once per machine.

Weights are float32 and scaled so that the draft's top-1 probability, the head's probability and the acceptance all
spread over their range: a wrong candidate, position or length then shows up in a round's record.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 512
SMALL_VOCAB_SIZE = 8
"""Few enough that the joint law of three tokens can be written out."""
HIDDEN_SIZE = 64
EOS = 2
MAX_POSITION = 512
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True)
class TinyModels:
    """Folders of the checkpoints."""

    root: Path

    def __getattr__(self, name: str) -> str:
        if name.startswith("_") or not (self.root / name).is_dir():
            raise AttributeError(name)
        return str(self.root / name)


def _llama(seed: int, *, vocab: int, layers: int = 2, logit_scale: float) -> LlamaForCausalLM:
    hidden = HIDDEN_SIZE
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=128, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 32, head_dim=32,
        max_position_embeddings=MAX_POSITION, bos_token_id=1, eos_token_id=EOS, pad_token_id=0,
        tie_word_embeddings=False, dtype="float32", initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(logit_scale)
        model.lm_head.weight[EOS].mul_(1.5)  # some drafts must end in EOS
    return model


def _noisy(model: LlamaForCausalLM, seed: int, noise: float) -> LlamaForCausalLM:
    """The same weights plus Gaussian noise, relative to each tensor's spread: a draft that is often right."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter) * noise * parameter.std())
    return model


def save_head(folder: Path, hidden: int, *, mean: float = 1.0, spread: float = 1.6) -> None:
    """A random head in the released format: tied residual blocks under repeated keys; class 1 = accept."""
    generator = torch.Generator().manual_seed(11)
    weight = torch.randn(hidden, hidden, generator=generator) * 0.05
    bias = torch.randn(hidden, generator=generator) * 0.05
    direction = torch.randn(hidden, generator=generator) * spread / hidden**0.5
    state = {}
    for block in range(3):
        state[f"model.{block}.linear.weight"] = weight.clone()
        state[f"model.{block}.linear.bias"] = bias.clone()
    state["model.3.weight"] = torch.stack((-direction, direction)) / 2
    state["model.3.bias"] = torch.tensor([0.0, mean])
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"hidden_size": hidden, "num_layers": 3}))


def _tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of exactly ``VOCAB_SIZE`` entries, trained on a standard module's source."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=["<pad>", "<bos>", "<eos>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(inspect.getsource(textwrap).splitlines(), trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        chat_template=CHAT_TEMPLATE, model_max_length=MAX_POSITION,
    )  # fmt: skip


def _write(root: Path) -> None:
    checkpoints = {
        "target": _llama(0, vocab=VOCAB_SIZE, logit_scale=3.0),
        "draft_good": _noisy(_llama(0, vocab=VOCAB_SIZE, logit_scale=3.0), 5, 0.012),
        "draft_rand": _llama(1, vocab=VOCAB_SIZE, layers=1, logit_scale=3.0),
        "draft_other_vocab": _llama(1, vocab=VOCAB_SIZE - 12, layers=1, logit_scale=3.0),
        "small_target": _llama(2, vocab=SMALL_VOCAB_SIZE, layers=1, logit_scale=0.8),
        "small_draft": _noisy(_llama(2, vocab=SMALL_VOCAB_SIZE, layers=1, logit_scale=0.8), 7, 0.2),
    }
    for name, model in checkpoints.items():
        model.save_pretrained(root / name)
    tokenizer = _tokenizer()
    for name in ("target", "draft_good", "draft_rand"):
        tokenizer.save_pretrained(root / name)
    save_head(root / "head", HIDDEN_SIZE)
    save_head(root / "head_wrong_size", 2 * HIDDEN_SIZE)


def ensure() -> TinyModels:
    """The checkpoints' folders, written first if need be (the folder's name holds this file's digest)."""
    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    parent = Path(os.environ.get("SPECDECPP_TEST_MODELS", tempfile.gettempdir()))
    root = parent / f"specdecpp-tiny-models-{digest}"
    if not root.is_dir():
        parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=parent))
        with torch.random.fork_rng():
            _write(scratch)
        try:
            scratch.rename(root)  # atomic: two test runs may start together
        except OSError:
            shutil.rmtree(scratch)
    return TinyModels(root)
