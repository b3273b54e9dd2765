# SPDX-License-Identifier: Apache-2.0
"""Where the draft model's KV has fallen behind the target's on Model Runner V2, and how it catches up.

A round that drafts nothing runs no draft pass: K = 0 costs what no speculation costs. The target's KV then gets ahead
of the draft's, and vLLM's prefix cache may hand such blocks to later requests. So blocks are remembered, on the device,
since only it knows where a request stands; the host knows which requests have such blocks and about how much they lack.
Until a first pass is left out for the first time nothing of this is kept, or costs anything.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

Span = tuple[int, int]
"""Positions of a request: the first, and the one after the last."""


def reading_passes(spans: Sequence[Span], most: int) -> list[list[Span]]:
    """Split what requests have to read into passes of a bounded size.

    Args:
        spans: of each request of the batch; empty ones read nothing.
        most: tokens of one pass, at least one a request.

    Returns:
        Per pass the span of each request. One that has nothing to read, or no room, has an empty span.
    """
    starts, passes = [start for start, _ in spans], []
    while any(start < end for start, (_, end) in zip(starts, spans, strict=True)):
        left = most - len(spans)  # each row of a pass has a token, of use or not
        taken = []
        for index, (_, end) in enumerate(spans):
            count = min(end - starts[index], left + 1) if starts[index] < end else 0
            left -= max(count - 1, 0)
            taken.append((starts[index], starts[index] + count))
            starts[index] += count
        passes.append(taken)
    return passes


class DraftKVGaps:
    """Blocks whose draft KV is not right, and the requests that have such blocks.

    Call :meth:`arrive` in each step, then either :meth:`leave_out`, or :meth:`catch_up` and, behind the first pass,
    :meth:`read`. Ranks that call the same with the same arguments run the same passes.

    Args:
        speculator: its model loaded, its block tables there.
    """

    def __init__(self, speculator: Any) -> None:
        self._speculator = speculator
        self._stale: torch.Tensor | None = None  # [num_blocks] bool
        self._behind: dict[str, int] = {}  # request id -> tokens that the draft model lacks, about

    def arrive(self, input_batch: Any, new: Collection[str]) -> None:
        """A step begins.

        Args:
            input_batch: of the step (``vllm.v1.worker.gpu.input_batch.InputBatch``).
            new: requests that came, or came back after a preemption, since the last step.
        """
        if self._stale is None:
            return
        held = self._speculator.requests
        self._behind = {name: n for name, n in self._behind.items() if name not in new and name in held}
        for index, name in enumerate(input_batch.req_ids):
            # What the prefix cache gave it may lack the draft's KV: only the device could tell.
            if name in new and (cached := int(input_batch.num_computed_prefill_tokens_np[index])):
                self._behind[name] = cached

    def missing(self, request_ids: Sequence[str]) -> list[int]:
        """Tokens of each request that the draft model would have to read before it drafts; about, and 0 for none."""
        return [self._behind.get(name, 0) for name in request_ids]

    def leave_out(self, input_batch: Any) -> None:
        """The target has read this step's tokens; the draft model will not."""
        if self._stale is None:
            self._stale = torch.zeros(self._num_blocks(), dtype=torch.bool, device=self._speculator.device)
        self._mark(input_batch, None)
        self._grow(input_batch, input_batch.req_ids)

    def read(self, input_batch: Any) -> None:
        """The draft model has read this step's tokens as well, rightly for the requests that are not behind."""
        if self._stale is None:
            return
        self._mark(input_batch, torch.tensor([name in self._behind for name in input_batch.req_ids]))
        self._grow(input_batch, [name for name in input_batch.req_ids if name in self._behind])

    def catch_up(self, input_batch: Any, rows: Sequence[int], ends: torch.Tensor) -> int:
        """Read what these requests lack. Waits for the device if there is any.

        Args:
            input_batch: of the step.
            rows: of the batch; those that are not behind are passed over.
            ends: [num_reqs] int64, positions up to which to read: the first pass reads on from there.

        Returns:
            How many passes that took.
        """
        rows = [row for row in rows if input_batch.req_ids[row] in self._behind]
        if not rows or self._stale is None:
            return 0
        table = self._block_table().gpu[input_batch.idx_mapping[rows]].long()  # [num_rows, max_num_blocks]
        upto = ends[rows].clamp(min=0)  # [num_rows]
        num_blocks = (upto + self._block_size - 1) // self._block_size
        columns = torch.arange(table.shape[1], device=table.device)
        stale = self._stale[table] & (columns < num_blocks[:, None])  # [num_rows, max_num_blocks]
        first = torch.where(stale.any(dim=1), stale.int().argmax(dim=1), num_blocks)
        starts = torch.minimum(first * self._block_size, upto)
        spans = [(0, 0)] * input_batch.num_reqs
        for row, span in zip(rows, torch.stack((starts, upto), dim=1).tolist(), strict=True):
            spans[row] = tuple(span)
        passes = reading_passes(spans, self._speculator.max_num_tokens)
        for taken in passes:
            slots = self._speculator.read_spans(input_batch, taken)[self._group]
            self._set(slots, False)
        for row in rows:
            del self._behind[input_batch.req_ids[row]]
        return len(passes)

    def _grow(self, input_batch: Any, names: Collection[str]) -> None:
        """These requests lack this step's tokens, too: a whole chunk of a prompt, else the one that was emitted."""
        for index, name in enumerate(input_batch.req_ids):
            if name in names:
                chunk = input_batch.is_prefilling_np[index]
                new = int(input_batch.num_scheduled_tokens[index]) if chunk else 1
                self._behind[name] = self._behind.get(name, 0) + new

    def _mark(self, input_batch: Any, stale: torch.Tensor | None) -> None:
        """The blocks of the tokens that the target has just read: stale or not, by request; all of them if None."""
        num_tokens, starts = input_batch.num_tokens, input_batch.query_start_loc
        tables = self._speculator.block_tables
        positions = input_batch.positions[:num_tokens]
        slots = tables.compute_slot_mappings(input_batch.idx_mapping, starts, positions, num_tokens)[self._group]
        if stale is None or not stale.any():
            self._set(slots, stale is None)
            return
        where = torch.arange(num_tokens, device=slots.device)
        owners = torch.bucketize(where, starts[1 : input_batch.num_reqs + 1].long(), right=True)
        self._set(slots, stale.to(slots.device, non_blocking=True)[owners.clamp(max=input_batch.num_reqs - 1)])

    def _set(self, slots: torch.Tensor, stale: bool | torch.Tensor) -> None:
        assert self._stale is not None
        blocks = (slots // self._block_size).clamp(min=0)  # no slot: vLLM's null block, which is nobody's
        if isinstance(stale, bool):
            self._stale.index_fill_(0, blocks, stale)
        else:
            self._stale[blocks] = stale
        self._stale[:1] = False

    @property
    def _group(self) -> int:
        """Index of a KV cache group with layers of the draft model; the groups of a request hold the same positions."""
        layers = self._speculator.draft_attn_layer_names
        groups = self._speculator.kv_cache_config.kv_cache_groups
        return next(i for i, group in enumerate(groups) if layers & set(group.layer_names))

    @property
    def _block_size(self) -> int:
        return int(self._speculator.block_tables.block_sizes[self._group])

    def _block_table(self) -> Any:
        return self._speculator.block_tables.block_tables[self._group]

    def _num_blocks(self) -> int:
        return int(self._speculator.kv_cache_config.num_blocks)
