# SPDX-License-Identifier: Apache-2.0
"""What the proposer reads of Model Runner V1: where each request stands, and how long it may still draft."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from vllm_specdecpp.engine.shared.requests import bound_of, is_constrained, stop_tokens_of
from vllm_specdecpp.engine.v1.inputs import RowState


class RunnerRequests:
    """The requests of a ``GPUModelRunner`` during one ``propose`` call, by row of its batch.

    Args:
        runner: read only: ``input_batch``, ``requests``, ``discard_request_mask``.
        longest: how long a sequence may become while it is drafted for, in tokens (``draft_limit.longest_drafted``).
        defaults: the server's sampling parameters (``ModelConfig.get_diff_sampling_param``).
    """

    def __init__(self, runner: Any, longest: int, defaults: Mapping[str, Any] = MappingProxyType({})) -> None:
        self._runner, self._longest, self._defaults = runner, longest, defaults

    def rows(self, query_starts: list[int], rejected: list[int]) -> list[RowState]:
        """Where each request stands after verification.

        Args:
            query_starts: [num_reqs + 1] where each request's tokens start in what the target has just read.
            rejected: [num_reqs] how many of those were rejected candidates.
        """
        batch = self._runner.input_batch
        computed = batch.num_computed_tokens_cpu  # [max_num_reqs] before this step's tokens
        return [
            RowState(
                request_id,
                int(computed[index]),
                int(computed[index]) + query_starts[index + 1] - query_starts[index] - rejected[index],
            )
            for index, request_id in enumerate(batch.req_ids)
        ]

    def token_ids(self, index: int, start: int, end: int) -> list[int]:
        """The request's tokens at positions ``start`` to ``end - 1``, all of them older than this step's."""
        ids: list[int] = self.older_tokens(index, end)[start:].tolist()
        return ids

    def older_tokens(self, index: int, end: int) -> Any:
        """[end] the request's tokens at positions before ``end``, none of this step's; a view."""
        return self._runner.input_batch.token_ids_cpu[index, :end]

    def is_prefilling(self, index: int) -> bool:
        """Whether the prompt is not read to its end yet, so that nothing was sampled."""
        return bool(self._runner.discard_request_mask.np[index])

    def remaining(self, row: RowState) -> int:
        """How many tokens the request may still emit, or be drafted for, after its next token."""
        request = self._runner.requests[row.request_id]
        remaining = self._longest - 1 - row.next_position
        if request.sampling_params is not None and request.sampling_params.max_tokens is not None:
            num_emitted = row.next_position + 1 - request.num_prompt_tokens
            remaining = min(remaining, request.sampling_params.max_tokens - num_emitted)
        return max(int(remaining), 0)

    def emitted(self, row: RowState) -> int:
        """How many tokens the request has emitted, its next token among them; 0 while its prompt is read."""
        return max(row.next_position + 1 - self._runner.requests[row.request_id].num_prompt_tokens, 0)

    def max_length(self, row: RowState, index: int, bound: int) -> int:
        """The request's own upper bound on its candidate length: one token of every round is the target's."""
        if self.is_prefilling(index):
            return 0
        return max(min(self.bound(row, bound), self.remaining(row) - 1), 0)

    def bound(self, row: RowState, bound: int) -> int:
        """What the request's parameters leave of the engine's upper bound."""
        return bound_of(self._runner.requests[row.request_id].sampling_params, bound)

    def is_constrained(self, row: RowState) -> bool:
        """See ``engine.shared.requests.is_constrained``."""
        return is_constrained(self._runner.requests[row.request_id].sampling_params, self._defaults)

    def will_go_on(self, row: RowState, index: int) -> bool:
        """Whether the request can need the draft model again, so that its KV must be kept right."""
        if self.is_prefilling(index):
            num_prompt_tokens = self._runner.requests[row.request_id].num_prompt_tokens
            room = self._longest - 1 - max(num_prompt_tokens, row.next_position)
        else:
            room = self.remaining(row)
        return self.bound(row, 1) > 0 and room > 1

    def stop_token_ids(self, rows: list[RowState]) -> torch.Tensor | None:
        """Tokens that end each request, padded with -1: [num_reqs, max_num_stop_tokens], or None if there are none."""
        lists = [stop_tokens_of(self._runner.requests[row.request_id].sampling_params) for row in rows]
        width = max(map(len, lists), default=0)
        return torch.tensor([ids + [-1] * (width - len(ids)) for ids in lists]) if width else None
