# SPDX-License-Identifier: Apache-2.0
"""A draft model that remembers every KV slot, and a scheduler that plays at random: any wrong index is a wrong draft.

Real are the speculator, vLLM's kernels, its block tables, attention metadata and forward context. The oracle keeps what
was written into each slot and finds it again only through the slot mapping, block table, sequence lengths and positions
that it is given; what it predicts, and how sure it is, is a hash of the whole context it can see.
"""

from __future__ import annotations

import hashlib
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

VOCAB = 512
BLOCK_SIZE = 32
LAYER = "draft.attention"
CONFIDENCES = (0.3, 0.6, 0.8, 0.9, 0.96, 0.97, 0.98, 0.99, 0.995, 0.998)
STOP_TOKEN = 7
NO_KV = -1


def predict(context: Sequence[int]) -> tuple[int, float]:
    """The next token and its probability after ``context``."""
    digest = hashlib.blake2b(np.asarray(context, dtype=np.int64).tobytes(), digest_size=8).digest()
    number = int.from_bytes(digest, "little")
    confidence = CONFIDENCES[number // VOCAB % len(CONFIDENCES)]
    # A stop token now and then.
    return (STOP_TOKEN if number >> 40 & 31 == 0 else number % VOCAB), confidence


@dataclass
class Stops:
    """The rule, written once more: when a draft of the oracle ends."""

    threshold: float  # 1 - survival above it ends the draft; 1 or more: never
    min_length: int = 1
    predict: Callable[[Sequence[int]], tuple[int, float]] = predict

    def draft(self, context: Sequence[int], cap: int, stops: frozenset[int]) -> list[int]:
        drafted: list[int] = []
        survival = np.float32(1.0)
        while len(drafted) < cap:
            token, confidence = self.predict([*context, *drafted])
            survival *= np.float32(confidence)
            drafted.append(token)
            if token in stops or (1 - survival > self.threshold and len(drafted) >= self.min_length):
                break
        return drafted


class OracleModel(torch.nn.Module):
    """Stands in for the draft model. A hidden state is (token, logit that gives it its probability)."""

    predict = staticmethod(predict)

    def __init__(self, num_slots: int) -> None:
        super().__init__()
        self.tokens = np.full(num_slots, NO_KV)
        self.positions = np.full(num_slots, NO_KV)
        self.passes: list[list[bool]] = []  # per pass, by row of the batch: whether it wrote any KV
        self.num_tokens: list[int] = []  # of each pass

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        from vllm.forward_context import get_forward_context

        context = get_forward_context()
        metadata, slots = context.attn_metadata[LAYER], context.slot_mapping[LAYER].numpy()
        assert metadata.num_actual_tokens == len(input_ids) <= len(slots)
        ends = metadata.query_start_loc.numpy()
        assert (ends[: metadata.num_reqs + 1] == metadata.query_start_loc_cpu.numpy()[: metadata.num_reqs + 1]).all()
        assert ((input_ids >= 0) & (input_ids < VOCAB)).all()  # an embedding table has no other rows
        written = slots[: len(input_ids)] >= 0
        self.tokens[slots[: len(input_ids)][written]] = input_ids.numpy()[written]
        self.positions[slots[: len(input_ids)][written]] = positions.numpy()[written]
        rows = [slice(int(ends[r]), int(ends[r + 1])) for r in range(metadata.num_reqs)]
        self.num_tokens.append(len(input_ids))
        self.passes.append([bool(written[row].any()) for row in rows])
        hidden = torch.zeros(len(input_ids), 2)
        for r, row in enumerate(rows):
            for index in range(row.start, row.stop):
                hidden[index] = self._read(metadata, r, row.stop - 1 - index, int(positions[index]))
        return hidden

    def _read(self, metadata: Any, row: int, tokens_after: int, position: int) -> torch.Tensor:
        """Causal attention of one token: over all KV of its request up to itself."""
        num_keys = int(metadata.seq_lens[row]) - tokens_after
        blocks = metadata.block_table_tensor[row].numpy()
        where = [int(blocks[p // BLOCK_SIZE]) * BLOCK_SIZE + p % BLOCK_SIZE for p in range(max(num_keys, 0))]
        seen = bool(where) and position == num_keys - 1 and (self.positions[where] == np.arange(num_keys)).all()
        if not seen:
            return torch.tensor([0.0, 0.0])  # nothing that a right draft would hold
        token, confidence = self.predict(self.tokens[where].tolist())
        return torch.tensor([float(token), float(np.log(confidence / (1 - confidence) * (VOCAB - 1)))])

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(hidden_states), VOCAB)
        return logits.scatter_(1, hidden_states[:, :1].long(), hidden_states[:, 1:])


class _Group:
    """An attention group whose metadata is vLLM's common metadata as it is."""

    kv_cache_spec = None
    layer_names = (LAYER,)

    def get_metadata_builder(self, ubatch_id: int = 0) -> Any:
        return types.SimpleNamespace(supports_update_block_table=False)

    def build_metadata(self, common: Any, *args: Any, **kwargs: Any) -> Any:
        return common


def attach(speculator: Any) -> OracleModel:
    """Give a speculator the oracle for a draft model, and the KV cache that goes with it."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.worker.gpu.block_table import BlockTables

    max_num_reqs, device = speculator.max_num_reqs, torch.device("cpu")
    blocks_each = speculator.max_model_len // BLOCK_SIZE + 1
    model = OracleModel((max_num_reqs * blocks_each + 1) * BLOCK_SIZE)
    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=8, dtype=torch.float32)
    groups = [types.SimpleNamespace(layer_names=[LAYER], kv_cache_spec=spec)]
    speculator.model = model
    speculator.draft_attn_layer_names = {LAYER}
    num_blocks = len(model.tokens) // BLOCK_SIZE
    speculator.kv_cache_config = types.SimpleNamespace(kv_cache_groups=groups, num_blocks=num_blocks)
    token_ids = torch.zeros(max_num_reqs, speculator.max_model_len, dtype=torch.int32)
    req_states = types.SimpleNamespace(all_token_ids=types.SimpleNamespace(gpu=token_ids))
    speculator.runner = types.SimpleNamespace(req_states=req_states)
    speculator.attn_groups = [[_Group()]]
    speculator.block_tables = BlockTables([BLOCK_SIZE], max_num_reqs, speculator.max_num_tokens, [blocks_each], device)
    speculator.expanded_slot_mappings = torch.empty(1, speculator.max_num_tokens + max_num_reqs, dtype=torch.int64)
    return model


@dataclass
class Request:
    """One request as the scheduler knows it."""

    state: int  # its row in the runner's request states
    tokens: list[int]
    cap: int | None = None
    end: int = 1 << 30  # how long the sequence may become
    stops: frozenset[int] = frozenset()
    num_read: int = 0  # tokens that the target has read, and that stay
    prefill: int = 0  # tokens that came as a prompt, of which some are not read yet
    drafts: list[int] = field(default_factory=list)  # submitted in the last round
    blocks: list[int] = field(default_factory=list)
