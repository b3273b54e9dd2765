# SPDX-License-Identifier: Apache-2.0
"""A draft model of random weights with a KV cache of fixed size, and captured rounds around it, without vLLM.

The rounds are the project's own (``engine.v2.graphs``, ``engine.v2.round``, the kernels); the model is the least that
costs what a Llama of this shape costs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.shapes import Shape
from vllm_specdecpp.decision.rules import ThresholdRule, make_estimator
from vllm_specdecpp.engine.v2.graphs import IF_NODES, DraftGraphs
from vllm_specdecpp.engine.v2.round import DeviceRound

SHORT = 2
"""Tokens a request that the first pass reads."""


class StaticDraft:
    """A dense Llama without rotary embeddings.

    Args:
        shape: layers, widths, heads.
        vocab_size: of embedding and lm_head.
        max_reqs, max_len: of the KV cache.
        dtype, device: of all weights.
    """

    def __init__(
        self, shape: Shape, vocab_size: int, max_reqs: int, max_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        torch.manual_seed(0)

        def weight(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, dtype=dtype, device=device) * columns**-0.5

        self.head_dim = shape.hidden // shape.heads
        kv = shape.kv_heads * self.head_dim
        self.shape, self.max_len = shape, max_len
        self.embedding, self.lm_head = weight(vocab_size, shape.hidden), weight(vocab_size, shape.hidden)
        self.layers = [
            {
                "qkv": weight(shape.hidden + 2 * kv, shape.hidden), "out": weight(shape.hidden, shape.hidden),
                "up": weight(2 * shape.intermediate, shape.hidden), "down": weight(shape.hidden, shape.intermediate),
                "keys": torch.zeros(max_reqs, max_len, kv, dtype=dtype, device=device),
                "values": torch.zeros(max_reqs, max_len, kv, dtype=dtype, device=device),
            }
            for _ in range(shape.layers)
        ]  # fmt: skip
        self._places = torch.arange(max_len, device=device)

    def __call__(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Hidden states [num_reqs, query_len, hidden_size] of tokens [num_reqs, query_len] at these positions."""
        num_reqs, query_len = input_ids.shape
        x = self.embedding[input_ids]
        seen = self._places <= positions[..., None]  # [num_reqs, query_len, max_len]
        where = positions[..., None]
        for layer in self.layers:
            kv = layer["keys"].shape[-1]
            query, key, value = functional.linear(_norm(x), layer["qkv"]).split([self.shape.hidden, kv, kv], dim=-1)
            layer["keys"][:num_reqs].scatter_(1, where.expand(-1, -1, kv), key)
            layer["values"][:num_reqs].scatter_(1, where.expand(-1, -1, kv), value)
            mixed = functional.scaled_dot_product_attention(
                self._heads(query, self.shape.heads),
                self._heads(layer["keys"][:num_reqs], self.shape.kv_heads),
                self._heads(layer["values"][:num_reqs], self.shape.kv_heads),
                attn_mask=seen[:, None],
                enable_gqa=True,
            )
            x = x + functional.linear(mixed.transpose(1, 2).reshape(num_reqs, query_len, -1), layer["out"])
            gate, up = functional.linear(_norm(x), layer["up"]).chunk(2, dim=-1)
            x = x + functional.linear(functional.silu(gate) * up, layer["down"])
        return _norm(x)

    def _heads(self, part: Tensor, num: int) -> Tensor:
        return part.view(len(part), -1, num, self.head_dim).transpose(1, 2)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """[num_reqs, vocab_size]."""
        return functional.linear(hidden_states, self.lm_head)


def _norm(x: Tensor) -> Tensor:
    return functional.rms_norm(x, x.shape[-1:])


class StaticRounds:
    """Rounds of the draft that the device ends after ``stop`` candidates (:class:`engine.v2.graphs.Rounds`).

    Args:
        draft: the model.
        max_reqs: largest batch.
        length: K.
        stop: candidates after which the rule stops: random weights are never sure of any.
    """

    def __init__(self, draft: StaticDraft, max_reqs: int, length: int, stop: int) -> None:
        device = draft.embedding.device
        self.draft, self.length = draft, length
        self.round = DeviceRound(torch.zeros(max_reqs, length, dtype=torch.int64, device=device))
        self.round.set_rule(ThresholdRule(make_estimator(None), 0.5), stop)
        self.tokens = torch.ones(max_reqs, SHORT, dtype=torch.int64, device=device)
        self._ones = torch.ones(max_reqs, dtype=torch.int32, device=device)

    @property
    def any_running(self) -> Tensor:
        return self.round.any_running

    def begin(self, size: int) -> None:
        """A round begins; what is queued here is queued outside the graphs."""
        self.round.limits[:size] = self.length
        self.round.limits[:size, 1] = self.draft.max_len
        self.round.limits[:size, 2:] = -1
        ones = self._ones[:size]
        self.round.start(size, ones * 8, ones * 0, ones)

    def prepare_capture(self, size: int) -> tuple[Callable[[], None], Callable[[int], None]]:
        self.begin(size)
        rows, state = slice(size), self.round

        def first() -> None:
            positions = state.next_positions[rows].clamp(min=1)
            self._pass(1, self.tokens[rows], torch.stack((positions - 1, positions), dim=1))

        def later(step: int) -> None:
            running = state.running[rows] > 0
            positions = (state.next_positions[rows] + state.lengths[rows]).clamp(max=self.draft.max_len - 1)
            self._pass(step, torch.where(running, state.token_ids[rows], 0)[:, None], positions[:, None])

        return first, later

    def _pass(self, step: int, input_ids: Tensor, positions: Tensor) -> None:
        hidden_states = self.draft(input_ids, positions)[:, -1]
        logits = self.draft.logits(hidden_states)
        self.round.observe_pass(step, logits, hidden_states)
        self.round.append_drawn(logits.argmax(dim=-1))

    def eager(self, size: int) -> None:
        """The round without graphs: the host asks after each pass."""
        first, later = self.prepare_capture(size)
        first()
        for step in range(2, self.length + 1):
            if not bool(self.any_running):
                return
            later(step)


class HostGraphs(DraftGraphs):
    """Where there is no CUDA: a graph is the function that would have been captured."""

    def _capture_round(self, first: Callable[[], None], later: Callable[[int], None]) -> list[Any]:
        steps = range(2, self._max_length + 1)
        if self.mode != IF_NODES:
            return [first, *(partial(later, step) for step in steps)]

        def rest() -> None:
            for step in steps:
                if bool(self._rounds.any_running):
                    later(step)

        return [first, rest]


class HostBackend:
    """Runs functions (:class:`engine.v2.graphs.Backend`)."""

    def replay(self, graph: Callable[[], None]) -> None:
        graph()

    def fetch(self, flag: Tensor) -> Callable[[], bool]:
        copy = flag.clone()
        return lambda: bool(copy)
