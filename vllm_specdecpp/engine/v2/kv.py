# SPDX-License-Identifier: Apache-2.0
"""Stale KV of the draft model on Model Runner V2: where it is behind the target's, and how it catches up.

A round that drafts nothing runs no draft pass, so that K = 0 costs what no speculation costs. Then the blocks that the
target has written hold no KV of the draft model: they are stale, and vLLM's prefix cache may hand them to later
requests. Which blocks are stale is kept on the device, because only the device knows where a request stands. The host
knows which requests have stale blocks, and about how many tokens they are behind. Nothing is kept before the first
round without a draft pass.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from vllm_specdecpp.engine.shared.kept_blocks import keeps_all_blocks
from vllm_specdecpp.engine.v2.in_flight import HostCopy

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
    """The stale blocks, and the requests that are behind.

    Call :meth:`arrive` in each step, then either :meth:`leave_out`, or :meth:`have_gaps` before a short first pass,
    :meth:`catch_up` and, behind the first pass, :meth:`read`. Ranks that call the same with the same arguments run the
    same passes.

    Args:
        speculator: its model loaded, its block tables there.
    """

    def __init__(self, speculator: Any) -> None:
        self._speculator = speculator
        self._stale: torch.Tensor | None = None  # [num_blocks] bool
        self._behind: dict[str, int] = {}  # request id -> about how many tokens it is behind, at most
        self._right: dict[str, int] = {}  # request id -> how many of these the device has found not to be stale
        self._told: dict[str, int] = {}  # request id -> how many tokens it was behind in the last report
        self._gaps: torch.Tensor | None = None  # [num_reqs] bool, of this step: :meth:`have_gaps`
        self._unread: dict[str, int] = {}  # request id -> at most so many tokens are missing, of this step alone

    @cached_property
    def can_catch_up(self) -> bool:
        """Whether rounds may run without a draft pass: only if a request keeps all of its blocks, and each rank holds
        all positions of a block."""
        speculator = self._speculator
        names = speculator.draft_attn_layer_names
        plain = keeps_all_blocks(speculator.vllm_config, speculator.kv_cache_config, names)
        return plain and speculator.block_tables.cp_size == 1 and speculator.pcp_manager is None

    def arrive(self, input_batch: Any, new: Collection[str]) -> None:
        """A step begins.

        Args:
            input_batch: of the step (``vllm.v1.worker.gpu.input_batch.InputBatch``).
            new: requests that came, or came back after a preemption, since the last step.
        """
        self._gaps, self._unread = None, {}
        if self._stale is None:
            return
        held = self._speculator.requests
        self._behind = {name: n for name, n in self._behind.items() if name not in new and name in held}
        self._right = {name: n for name, n in self._right.items() if name in self._behind}
        self._told = {name: n for name, n in self._told.items() if name in self._behind}
        cached = input_batch.num_computed_prefill_tokens_np
        rows = [row for row, name in enumerate(input_batch.req_ids) if name in new and cached[row]]
        if not rows:
            return
        # Blocks from the prefix cache may be stale: only the device can tell, and its answer comes later.
        ends = self._speculator.on_device(cached[rows].astype("int64"))
        starts = self._first_stale(input_batch, self._speculator.on_device(rows), ends)
        names = [input_batch.req_ids[row] for row in rows]
        self._behind |= dict(zip(names, cached[rows].tolist(), strict=True))
        self._speculator.log.in_flight.send(HostCopy(starts), self._found, names)

    def _found(self, starts: torch.Tensor, names: Sequence[str]) -> None:
        self._right |= dict(zip(names, starts.tolist(), strict=True))

    def missing(self, request_ids: Sequence[str]) -> list[int]:
        """About how many tokens each request is behind: [num_reqs].

        Ranks may get different answers, so the passes that they run must not depend on them.
        """
        self._speculator.log.in_flight.settle()
        counted = [max(self._behind.get(name, 0) - self._right.get(name, 0), 0) for name in request_ids]
        return [self._told.get(name, count) for name, count in zip(request_ids, counted, strict=True)]

    def told(self, behind: Mapping[str, int]) -> None:
        """The device has said of an earlier step by how many tokens requests were behind in it."""
        self._told |= {name: count for name, count in behind.items() if name in self._behind}

    def num_behind(self, input_batch: Any, next_positions: torch.Tensor) -> torch.Tensor:
        """[num_reqs] int64, by how many tokens each request is behind, the two of a usual first pass left out."""
        ends = next_positions[: input_batch.num_reqs] - 1
        if self._stale is None:
            return torch.zeros_like(ends)
        return (ends - self._first_stale(input_batch, slice(len(ends)), ends)).clamp(min=0)

    def have_gaps(self, input_batch: Any, unread: Mapping[str, int], gaps: torch.Tensor) -> None:
        """Tokens that nobody drafted were accepted in this step; a short first pass will not read them.

        Args:
            input_batch: of the step.
            unread: of one or more requests that this may be so of, so many tokens before their last one hold the gap.
            gaps: [num_reqs] bool, where it is so.
        """
        self._keep()
        slots = torch.where(gaps[self._owners(input_batch)], self._slots(input_batch), -1)
        self._set(slots, True)
        self._gaps = gaps.clone()
        self._unread = {name: count for name, count in unread.items() if name not in self._behind}
        self._behind |= dict.fromkeys(self._unread, 0)

    def leave_out(self, input_batch: Any) -> None:
        """The target has read this step's tokens; the draft model will not."""
        if not self.can_catch_up:
            return
        self._keep()
        self._mark(input_batch, True)
        self._grow(input_batch)

    def read(self, input_batch: Any) -> None:
        """The draft model has read this step's tokens, too; they are stale still where older tokens were."""
        if self._stale is None:
            return
        behind = {name for name in input_batch.req_ids if name in self._behind}
        if not behind:
            self._mark(input_batch, False)
            return
        rows = slice(input_batch.num_reqs)
        begins = input_batch.positions[input_batch.query_start_loc[rows]]
        stale = self._first_stale(input_batch, rows, begins) < begins
        self._mark(input_batch, stale if self._gaps is None else stale | self._gaps)
        self._grow(input_batch, behind)

    def catch_up(self, input_batch: Any, rows: Sequence[int], ends: torch.Tensor) -> list[int]:
        """Let the draft model read what these requests are behind. Waits for the device if one was behind before.

        Of one that lacks tokens of this step alone, as many are read as may be missing: the host knows that.

        Args:
            input_batch: of the step.
            rows: of the batch; requests that are not behind are skipped.
            ends: [num_reqs] int64, positions before which to read; the round's first pass reads the rest.

        Returns:
            Tokens of each pass that was run.
        """
        names = input_batch.req_ids
        rows = [row for row in rows if names[row] in self._behind]
        if not rows or self._stale is None:
            return []
        index = self._speculator.on_device(rows)
        spans = [(0, 0)] * input_batch.num_reqs
        for row in rows:
            spans[row] = 0, self._unread.get(names[row], 0)
        counts = self._speculator.on_device(np.array([count for _, count in spans], dtype=np.int64))
        bases = torch.where(counts > 0, ends[: len(spans)] - counts, 0).clamp(min=0)  # [num_reqs], where spans begin
        if late := [row for row in rows if not spans[row][1]]:
            at = self._speculator.on_device(late)
            upto = ends[at].clamp(min=0)  # [num_late]
            starts = self._first_stale(input_batch, at, upto)
            # Ranks must run the same passes.
            agreed = self._speculator.agree(torch.stack((starts, upto), dim=1)).tolist()
            for row, span in zip(late, agreed, strict=True):
                spans[row] = tuple(span)
        passes = reading_passes(spans, self._speculator.max_num_tokens)
        for taken in passes:
            slots = self._speculator.read_spans(input_batch, taken, bases)[self._group]
            self._set(slots, False)
        for row in rows:
            for known in (self._behind, self._right, self._told):
                known.pop(names[row], None)
        if self._gaps is not None:
            self._gaps.index_fill_(0, index, False)
        return [sum(max(end - start, 1) for start, end in taken) for taken in passes]

    def _grow(self, input_batch: Any, names: Collection[str] | None = None) -> None:
        """These requests, or all, are behind by this step's tokens, too: a prompt's chunk, else the emitted token."""
        for index, name in enumerate(input_batch.req_ids):
            if names is None or name in names:
                chunk = input_batch.is_prefilling_np[index]
                new = int(input_batch.num_scheduled_tokens[index]) if chunk else 1
                self._behind[name] = self._behind.get(name, 0) + new

    def _first_stale(self, input_batch: Any, rows: torch.Tensor | slice, ends: torch.Tensor) -> torch.Tensor:
        """First position in a stale block of each of these rows, or its end if there is none: [num_rows] int64."""
        assert self._stale is not None
        size, longest = self._block_size, int(input_batch.seq_lens_cpu_upper_bound.max())
        table = self._speculator.block_tables.block_tables[self._group].gpu
        blocks = table[input_batch.idx_mapping[rows], : -(-longest // size)]  # [num_rows, num_blocks]
        begins = torch.arange(0, blocks.shape[1] * size, size, device=blocks.device)
        first = torch.where(self._stale[blocks], begins, len(begins) * size).amin(dim=1)
        return torch.minimum(first, ends)

    def _mark(self, input_batch: Any, stale: bool | torch.Tensor) -> None:
        """Mark the blocks of the tokens that the target has just read; ``stale`` is for all, or [num_reqs] bool."""
        self._set(self._slots(input_batch), stale if isinstance(stale, bool) else stale[self._owners(input_batch)])

    def _slots(self, input_batch: Any) -> torch.Tensor:
        """[num_tokens] slots of the tokens that the target has just read."""
        num_tokens, starts = input_batch.num_tokens, input_batch.query_start_loc
        slots: torch.Tensor = self._speculator.block_tables.compute_slot_mappings(
            input_batch.idx_mapping, starts, input_batch.positions[:num_tokens], num_tokens
        )[self._group]
        return slots

    def _owners(self, input_batch: Any) -> torch.Tensor:
        """[num_tokens] whose they are."""
        starts, num_reqs = input_batch.query_start_loc, input_batch.num_reqs
        where = torch.arange(input_batch.num_tokens, dtype=starts.dtype, device=starts.device)
        return torch.bucketize(where, starts[1 : num_reqs + 1], right=True).clamp_(max=num_reqs - 1)

    def _keep(self) -> None:
        """Begin to keep which blocks are stale."""
        if self._stale is None:
            self._stale = torch.zeros(self._num_blocks(), dtype=torch.bool, device=self._speculator.device)

    def _set(self, slots: torch.Tensor, stale: bool | torch.Tensor) -> None:
        assert self._stale is not None
        blocks = (slots // self._block_size).clamp(min=0)  # no slot: vLLM's null block, which is nobody's
        if isinstance(stale, bool):
            self._stale.index_fill_(0, blocks, stale)
        else:
            self._stale[blocks] = stale
        self._stale[:1] = False

    @cached_property
    def _group(self) -> int:
        """Index of a KV cache group with layers of the draft model; the groups of a request hold the same positions."""
        layers = self._speculator.draft_attn_layer_names
        groups = self._speculator.kv_cache_config.kv_cache_groups
        return next(i for i, group in enumerate(groups) if layers & set(group.layer_names))

    @cached_property
    def _block_size(self) -> int:
        return int(self._speculator.block_tables.block_sizes[self._group])

    def _num_blocks(self) -> int:
        return int(self._speculator.kv_cache_config.num_blocks)
