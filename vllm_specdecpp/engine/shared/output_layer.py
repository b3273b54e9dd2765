# SPDX-License-Identifier: Apache-2.0
"""An output layer cut to some token ids: a draft's largest matrix product, for the tokens that it proposes.

All other tokens have probability 0, so the target's law stays what it is. Scale and soft cap are the model's own
(``LogitsProcessor``). What reads logits may as well read these few columns: on a CPU the top-1 probability and the
argmax of 16 rows take 45 ms of 151,936 columns, mostly -inf, and 4 ms of 32,768. :meth:`Columns.token_ids` says which
tokens they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Module
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

from vllm_specdecpp.engine.shared.draft_vocab import FILE


class TrimmedHead(ParallelLMHead):
    """Some rows of an output layer. The ranks share these rows as vLLM shares all of them: each has as many.

    Args:
        layer: the whole one, loaded, unquantised.
        token_ids: [num_ids] int64 on the host, ascending: the rows to keep.
    """

    def __init__(self, layer: VocabParallelEmbedding, token_ids: torch.Tensor) -> None:
        parameters = dict(layer.named_parameters(recurse=False))  # weight, at times bias
        weight = layer.weight
        with weight.device:
            super().__init__(
                len(token_ids), layer.embedding_dim, bias="bias" in parameters, params_dtype=weight.dtype,
                disable_tp=layer.disable_tp,
            )  # fmt: skip
            record_metadata_for_reloading(self)
        self.token_ids = token_ids
        for name, tensor in parameters.items():
            super().weight_loader(getattr(self, name), _rows(layer, tensor, token_ids))
        self.quant_method.process_weights_after_loading(self)

    def weight_loader(self, param: torch.nn.Parameter, loaded_weight: torch.Tensor) -> None:
        """Take this rank's rows of a whole layer [num_rows, ...], when weights are loaded anew."""
        super().weight_loader(param, loaded_weight[self.token_ids])


def _rows(layer: VocabParallelEmbedding, mine: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Rows of a layer that the ranks share, on each of them: [num_ids, ...]; ``mine`` is this rank's share."""
    shard = layer.shard_indices
    start, end = shard.org_vocab_start_index, shard.org_vocab_end_index
    held = (token_ids >= start) & (token_ids < end)
    rows = mine.new_zeros(len(token_ids), *mine.shape[1:])
    rows[held] = mine[token_ids[held] - start]
    return tensor_model_parallel_all_reduce(rows) if layer.tp_size > 1 else rows


class Columns:
    """What a draft's columns of logits stand for. Static shapes, and no wait for the device.

    Args:
        token_ids: [num_columns] int64 on the draft's device; None: a column for each id.
        num_ids: of the target's vocabulary.
    """

    def __init__(self, token_ids: torch.Tensor | None = None, num_ids: int = 0) -> None:
        self._token_ids, self._num_ids = token_ids, num_ids

    def token_ids(self, columns: torch.Tensor) -> torch.Tensor:
        """The tokens of drawn columns, of the same shape."""
        return columns if self._token_ids is None else self._token_ids[columns]

    def spread(self, values: torch.Tensor, fill: float) -> torch.Tensor:
        """[num_rows, num_columns] → [num_rows, num_ids], ``fill`` for ids without a column."""
        if self._token_ids is None:
            return values
        return values.new_full((len(values), self._num_ids), fill).index_copy_(1, self._token_ids, values)


def trim(model: Module, token_ids: torch.Tensor) -> torch.Tensor:
    """Let a loaded model's ``compute_logits`` compute these ids' logits alone: [num_tokens, num_ids], in this order.

    The whole layer is released where it is not the embedding as well.

    Args:
        model: with one output layer.
        token_ids: [num_ids] int64 on the host, ascending, below the model's number of rows.

    Returns:
        ``token_ids`` on the model's device.

    Raises:
        ValueError: one line: the layer cannot be cut.
    """
    processor = _only(model, LogitsProcessor)
    is_head = any(isinstance(module, ParallelLMHead) for module in model.modules())
    layer = _only(model, ParallelLMHead if is_head else VocabParallelEmbedding)
    plain = isinstance(layer.quant_method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod)
    if not plain or len(layer.weight) != layer.num_embeddings_per_partition:
        raise ValueError(
            f"specdecpp: {FILE} cuts the draft's output layer, but that is quantised; leave lm_head out of the "
            "quantisation (ignore), or remove the file"
        )
    head = TrimmedHead(layer, token_ids)
    if is_head:
        owner, name = next((m, n) for m in model.modules() for n, child in m.named_children() if child is layer)
        setattr(owner, name, head)
    else:  # the embedding stays; the new layer is among the parameters all the same, for sleep and reload
        model.specdecpp_trimmed_head = head
    processor.org_vocab_size = len(token_ids)
    processor.register_forward_pre_hook(lambda _, args: (head, *args[1:]))
    # vLLM keeps a draft's buffers while it sleeps.
    processor.register_buffer("specdecpp_token_ids", token_ids.to(layer.weight.device), persistent=False)
    return processor.specdecpp_token_ids


def _only(model: Module, kind: type[Any]) -> Any:
    found = [module for module in model.modules() if isinstance(module, kind)]
    if len(found) != 1:
        raise ValueError(
            f"specdecpp: {FILE} cuts the draft's output layer, but {type(model).__name__} has {len(found)} of "
            f"{kind.__name__}; remove the file"
        )
    return found[0]
