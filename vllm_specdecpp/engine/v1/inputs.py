# SPDX-License-Identifier: Apache-2.0
"""Which tokens a draft pass must read, and where their KV goes. Pure torch, no vLLM import.

vLLM's first draft pass re-reads every token the target has just verified. The draft model's KV of accepted candidates
is in its cache already, except that of a candidate that was drawn last and never fed back; so one or two tokens a
request suffice, whatever the candidate length was. After rounds without a draft pass there are more: they are read from
the request's own tokens, in passes of bounded size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

PADDING_SLOT_ID = -1
"""vLLM's slot for "write nowhere" (``vllm.v1.spec_decode.utils.PADDING_SLOT_ID``)."""


@dataclass
class RowState:
    """One request at the start of a round, all positions 0-based in its token sequence."""

    request_id: str
    first_query_position: int
    """Position of the first token that the target has just read."""
    next_position: int
    """Position of the token that the target has just emitted (recovered, bonus, or the first one)."""


@dataclass
class RowBlocks:
    """The KV-cache blocks of one request."""

    ids: torch.Tensor  # [max_num_blocks] int32, its row of the block table
    block_size: int

    def covering(self, start: int, end: int) -> list[int]:
        """Ids of the blocks that hold positions ``start`` to ``end - 1``."""
        return self.ids[start // self.block_size : -(-end // self.block_size)].tolist()


class DraftKV:
    """Up to which position each request's draft KV is up to date, and which blocks are stale.

    An entry holds for the next round only, and only if the target's query then starts where this round's next token
    stands. A request that was preempted, resumed or finished in between loses its entry. It is read from the start of
    its query, as vLLM does, because the prefix cache holds the draft's KV in the same blocks as the target's. Blocks
    that the target wrote while no draft pass was run are the exception: they are stale, and remembered as such. So may
    blocks be that another request has written in this very step: a request that joins can share them already.
    """

    def __init__(self) -> None:
        self._entries: dict[str, tuple[int, int]] = {}  # request id -> (next position, up to date before this one)
        self._stale: set[int] = set()  # blocks with the target's KV, but not the draft's
        self._written: set[int] = set()  # blocks that the target has written in this step, if somebody may share them

    def begin(self, rows: Sequence[RowState], blocks: Sequence[RowBlocks]) -> None:
        """A round begins; ``blocks`` of each row."""
        self._written = set()
        if any(row.first_query_position > 0 and not self.continues(row) for row in rows):
            for row, own in zip(rows, blocks, strict=True):
                self._written.update(own.covering(row.first_query_position, row.next_position))

    def first_missing(self, row: RowState, blocks: RowBlocks) -> int:
        """The first position whose draft KV has to be written; at most the next token's own position."""
        if self.continues(row):
            return min(self._entries[row.request_id][1], row.next_position)
        if self._stale or self._written:
            for number, block_id in enumerate(blocks.covering(0, row.first_query_position)):
                if block_id in self._stale or block_id in self._written:
                    return number * blocks.block_size
        return row.first_query_position

    def continues(self, row: RowState) -> bool:
        """Whether the target has just verified what was drafted for this request in the last round."""
        entry = self._entries.get(row.request_id)
        return entry is not None and entry[0] == row.first_query_position

    def replace(self, rows: list[RowState], num_fed: Sequence[int | None], blocks: Sequence[RowBlocks]) -> None:
        """Forget the last round.

        Args:
            rows: of this round.
            num_fed: how many tokens from the next token on were read for each; None: no pass was run for it.
            blocks: of each row.
        """
        starts = [self.first_missing(row, own) for row, own in zip(rows, blocks, strict=True)]
        rights = [start if fed is None else row.next_position + fed
                  for row, fed, start in zip(rows, num_fed, starts, strict=True)]  # fmt: skip
        for row, fed, own, right in zip(rows, num_fed, blocks, rights, strict=True):
            if fed is None:
                self._stale.update(own.covering(right, row.next_position))
        for fed, own, start, right in zip(num_fed, blocks, starts, rights, strict=True):
            if fed is not None and self._stale:  # also what it shares with requests that were left out
                self._stale.difference_update(own.covering(start, right))
        self._entries = {row.request_id: (row.next_position, right) for row, right in zip(rows, rights, strict=True)}


@dataclass
class DraftInputs:
    """The flattened input of one draft pass."""

    token_ids: torch.Tensor  # [num_tokens] int32
    positions: torch.Tensor  # [num_tokens] int64
    slot_mapping: torch.Tensor  # [num_tokens] int64
    query_start_loc: torch.Tensor  # [num_reqs + 1] int32, on the CPU
    seq_lens: torch.Tensor  # [num_reqs] int32, on the CPU
    rows: torch.Tensor  # [num_reqs] int64, on the CPU: which of the requests these are

    @property
    def last_indices(self) -> torch.Tensor:
        """Index of each request's last token, whose hidden state yields the next candidate."""
        return self.query_start_loc[1:].long() - 1  # [num_reqs]


def slots(
    block_table: torch.Tensor,  # [num_reqs, max_num_blocks] int32
    rows: torch.Tensor,  # [num_tokens] row of each token
    positions: torch.Tensor,  # [num_tokens]
    block_size: int,
    max_model_len: int,
) -> torch.Tensor:
    """KV-cache slot of each token; tokens at or beyond ``max_model_len`` write nowhere. Returns [num_tokens] int64."""
    inside = positions < max_model_len
    block_index = (torch.where(inside, positions, 0) // block_size).long()
    block_ids = block_table[rows, block_index].long()
    return torch.where(inside, block_ids * block_size + positions % block_size, PADDING_SLOT_ID)


def first_pass(
    rows: list[RowState],
    first_missing: list[int],
    target_token_ids: torch.Tensor,  # [num_target_tokens] what the target has just read
    query_starts: list[int],  # where each request's part of target_token_ids starts
    next_token_ids: torch.Tensor,  # [num_reqs]
    block_table: torch.Tensor,  # [num_reqs, max_num_blocks]
    block_size: int,
    max_model_len: int,
    earlier: Callable[[int, int, int], Sequence[int]] | None = None,
    max_num_tokens: int | None = None,
) -> list[DraftInputs]:
    """The pass that brings the draft's KV up to the target's last emitted token.

    For each request: its tokens from ``first_missing`` on, then its next token.

    Args:
        earlier: (request's index, start, end) -> its tokens at these positions, all before what the target has just
            read; needed only after rounds without a draft pass.
        max_num_tokens: the most tokens of one pass, at least one a request; None: no bound.

    Returns:
        The last pass, which has every request's next token, after those that had to be split off it.
    """
    starts = list(first_missing)
    passes: list[list[tuple[int, int]]] = []  # per pass: first and last position + 1 of each request
    # What stays for the last pass, so that it looks like any other round's.
    kept = 1 if max_num_tokens is not None and 2 * len(rows) > max_num_tokens else 2
    lengths = [row.next_position + 1 - start for row, start in zip(rows, starts, strict=True)]
    while max_num_tokens is not None and sum(lengths) > max_num_tokens:
        budget, spans = max_num_tokens, []
        for index, start in enumerate(starts):
            taken = max(min(lengths[index] - kept, budget), 0)
            spans.append((start, start + taken))
            starts[index], lengths[index], budget = start + taken, lengths[index] - taken, budget - taken
        passes.append(spans)
    passes.append([(start, row.next_position + 1) for row, start in zip(rows, starts, strict=True)])

    def tokens(index: int, start: int, end: int) -> torch.Tensor:
        row = rows[index]
        before, parts = min(end, row.first_query_position), []
        if start < before:
            assert earlier is not None, "tokens from before the query are needed, and nobody to give them"
            parts.append(torch.tensor(list(earlier(index, start, before)), dtype=torch.int32, device=device))
        offset = query_starts[index] - row.first_query_position
        now, last = max(start, row.first_query_position), min(end, row.next_position)
        if now < last:
            parts.append(target_token_ids[now + offset : last + offset].int())
        if end > row.next_position:
            parts.append(next_token_ids[index : index + 1].int())
        return torch.cat(parts)

    device = target_token_ids.device
    out = []
    for spans in passes:
        owners = [index for index, (start, end) in enumerate(spans) if start < end]
        spans = [spans[index] for index in owners]
        counts = torch.tensor([end - start for start, end in spans])
        query_start_loc = torch.zeros(len(owners) + 1, dtype=torch.int32)
        query_start_loc[1:] = counts.cumsum(0)
        positions = torch.cat([torch.arange(start, end) for start, end in spans]).to(device)
        owner = torch.tensor(owners).repeat_interleave(counts).to(device)
        out.append(
            DraftInputs(
                token_ids=torch.cat([tokens(i, *span) for i, span in zip(owners, spans, strict=True)]),
                positions=positions,
                slot_mapping=slots(block_table, owner, positions, block_size, max_model_len),
                query_start_loc=query_start_loc,
                seq_lens=torch.tensor([end for _, end in spans], dtype=torch.int32),
                rows=torch.tensor(owners),
            )
        )
    return out


def decode_pass(
    token_ids: torch.Tensor,  # [num_running] the candidates drawn last
    positions: torch.Tensor,  # [num_running] their positions
    block_table: torch.Tensor,  # [num_running, max_num_blocks]
    block_size: int,
    max_model_len: int,
) -> DraftInputs:
    """The pass that reads one candidate of each running request."""
    num_reqs = token_ids.shape[0]
    rows = torch.arange(num_reqs, device=token_ids.device)
    return DraftInputs(
        token_ids=token_ids.int(),
        positions=positions.clamp(max=max_model_len - 1),
        slot_mapping=slots(block_table, rows, positions, block_size, max_model_len),
        query_start_loc=torch.arange(num_reqs + 1, dtype=torch.int32),
        seq_lens=(positions + 1).clamp(max=max_model_len).int().cpu(),
        rows=torch.arange(num_reqs),
    )
