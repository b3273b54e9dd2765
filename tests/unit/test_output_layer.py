# SPDX-License-Identifier: Apache-2.0
"""A trimmed output layer gives the whole one's logits at its ids and -inf elsewhere, for all kinds of layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

vocab_parallel = pytest.importorskip("vllm.model_executor.layers.vocab_parallel_embedding")

from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.model_executor.layers.logits_processor import LogitsProcessor  # noqa: E402

from vllm_specdecpp.engine.shared import output_layer  # noqa: E402

ROWS, HIDDEN = 200, 16
IDS = torch.tensor([0, 3, 4, 77, 99, 100, 128, 150, 199])
"""On both sides of where two ranks share 256 padded rows."""
WEIGHT = torch.randn(ROWS, HIDDEN, generator=torch.Generator().manual_seed(1))
BIAS = torch.randn(ROWS, generator=torch.Generator().manual_seed(2))
STATES = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(3))


class Draft(torch.nn.Module):
    """Embedding, output layer, logits: as vLLM's models have them."""

    def __init__(self, tied: bool = False, bias: bool = False, **processor: Any) -> None:
        super().__init__()
        with set_current_vllm_config(VllmConfig()):
            self.logits_processor = LogitsProcessor(ROWS, **processor)
        if tied:  # the embedding itself, as Gemma 2
            self.embed_tokens = vocab_parallel.VocabParallelEmbedding(ROWS, HIDDEN)
        else:
            self.lm_head = vocab_parallel.ParallelLMHead(ROWS, HIDDEN, bias=bias)
        self.layer.weight_loader(self.layer.weight, WEIGHT)
        if bias:
            self.layer.weight_loader(self.layer.bias, BIAS)
        self.layer.quant_method.process_weights_after_loading(self.layer)

    @property
    def layer(self) -> Any:
        return self.lm_head if hasattr(self, "lm_head") else self.embed_tokens

    def compute_logits(self, hidden_states: torch.Tensor) -> Any:
        return self.logits_processor(self.layer, hidden_states, getattr(self.layer, "bias", None))


@pytest.fixture
def rank(monkeypatch):
    """Sets this process's rank, and of how many."""

    def set_rank(mine: int, num: int) -> None:
        monkeypatch.setattr(vocab_parallel, "get_tensor_model_parallel_rank", lambda: mine)
        monkeypatch.setattr(vocab_parallel, "get_tensor_model_parallel_world_size", lambda: num)

    set_rank(0, 1)
    return set_rank


@pytest.mark.parametrize(
    "kind",
    [{}, {"tied": True}, {"bias": True}, {"soft_cap": 5.0, "scale": 0.5}, {"tied": True, "soft_cap": 2.0}],
    ids=str,
)
def test_logits_are_those_of_the_whole_layer(rank, kind):
    draft = Draft(**kind)
    whole, before = draft.compute_logits(STATES), draft.layer
    token_ids = output_layer.trim(draft, IDS)
    assert torch.equal(token_ids, IDS)
    torch.testing.assert_close(draft.compute_logits(STATES), whole[:, IDS])
    assert (draft.layer is before) == kind.get("tied", False)  # else the whole layer is released
    assert sum(len(p) == len(IDS) or len(p) == 64 for p in draft.parameters()) >= 1  # kept through sleep


def test_columns_stand_for_token_ids():
    columns, values = output_layer.Columns(IDS, ROWS), torch.randn(2, len(IDS), dtype=torch.bfloat16)
    assert columns.token_ids(torch.tensor([[1, 8]])).tolist() == [[3, 199]]
    spread = columns.spread(values, -torch.inf)
    assert spread.shape == (2, ROWS) and torch.equal(spread[:, IDS], values)
    assert int((spread == -torch.inf).sum()) == 2 * (ROWS - len(IDS))
    assert output_layer.Columns().spread(values, 0.0) is values and output_layer.Columns().token_ids(IDS) is IDS


def test_new_weights_are_cut_as_well(rank):
    """As vLLM loads them into a running model: by name, layer by layer."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    draft = Draft()
    output_layer.trim(draft, IDS)
    place = draft.lm_head.weight.data_ptr()
    initialize_layerwise_reload(draft)
    draft.lm_head.weight.weight_loader(draft.lm_head.weight, -WEIGHT)
    finalize_layerwise_reload(draft, None)
    torch.testing.assert_close(draft.compute_logits(STATES), -(STATES @ WEIGHT.T)[:, IDS])
    assert draft.lm_head.weight.data_ptr() == place  # a captured graph reads it


def _of_ranks(rank: Any, monkeypatch: Any, num: int) -> tuple[list[Any], torch.Tensor]:
    """Each rank's trimmed layer, and the logits gathered from them."""

    def make(all_reduce: Any) -> list[Any]:
        monkeypatch.setattr(output_layer, "tensor_model_parallel_all_reduce", all_reduce)
        heads = []
        for mine in range(num):
            rank(mine, num)
            heads.append(output_layer.TrimmedHead(Draft().lm_head, IDS))
        return heads

    sent: list[torch.Tensor] = []

    def send(rows: torch.Tensor) -> torch.Tensor:
        sent.append(rows)
        return rows

    make(send)
    heads = make(lambda rows: torch.stack(sent).sum(dim=0))
    logits = [head.quant_method.apply(head, STATES) for head in heads]
    return heads, torch.cat(logits, dim=1)[:, : len(IDS)]


@pytest.mark.parametrize("num", [2, 4])
def test_ranks_share_the_rows(rank, monkeypatch, num):
    heads, logits = _of_ranks(rank, monkeypatch, num)
    torch.testing.assert_close(logits, (STATES @ WEIGHT.T)[:, IDS])
    assert {len(head.weight) for head in heads} == {64 // num}  # each as many


def test_a_rank_with_the_wrong_rows_is_noticed(rank, monkeypatch):
    """The test's power: the second rank takes its rows for the first one's."""
    original = output_layer._rows

    def wrong(layer: Any, mine: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        return original(layer, mine.roll(1, dims=0) if layer.tp_rank else mine, token_ids)

    monkeypatch.setattr(output_layer, "_rows", wrong)
    assert not torch.allclose(_of_ranks(rank, monkeypatch, 2)[1], (STATES @ WEIGHT.T)[:, IDS])


def test_what_cannot_be_cut_is_refused(rank):
    draft = Draft()
    draft.layer.quant_method = object()
    with pytest.raises(ValueError, match="^specdecpp: .* is quantised; leave lm_head out"):
        output_layer.trim(draft, IDS)
    with pytest.raises(ValueError, match="^specdecpp: .* Identity has 0 of LogitsProcessor; remove the file$"):
        output_layer.trim(torch.nn.Identity(), IDS)
