# SPDX-License-Identifier: Apache-2.0
"""Which tokens a draft pass must read, and where their KV goes. Pure torch, no vLLM import.

vLLM's first draft pass re-reads every token the target has just verified. The draft model's KV of accepted candidates
is in its cache already, except that of a candidate that was drawn last and never fed back; so one or two tokens a
request suffice, whatever the candidate length was.
"""

from __future__ import annotations

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


class DraftKV:
    """How far each request's draft KV is right.

    An entry holds only if the target's next query starts exactly where this round's next token stands, in the very
    next round: a request that was preempted, resumed or finished in between loses it, and is read from the start of
    its query, as vLLM does (cached blocks hold draft KV as well as target KV).
    """

    def __init__(self) -> None:
        self._entries: dict[str, tuple[int, int]] = {}  # request id -> (next position, KV right before this position)

    def first_missing(self, row: RowState) -> int:
        """The first position whose draft KV has to be written; at most the next token's own position."""
        entry = self._entries.get(row.request_id)
        if entry is None or entry[0] != row.first_query_position:
            return row.first_query_position
        return min(entry[1], row.next_position)

    def continues(self, row: RowState) -> bool:
        """Whether the target has just verified what was drafted for this request in the last round."""
        entry = self._entries.get(row.request_id)
        return entry is not None and entry[0] == row.first_query_position

    def replace(self, rows: list[RowState], num_fed: list[int]) -> None:
        """Forget the last round; ``num_fed[i]`` tokens from the next token on were read for ``rows[i]``."""
        self._entries = {
            row.request_id: (row.next_position, row.next_position + fed) for row, fed in zip(rows, num_fed, strict=True)
        }


@dataclass
class DraftInputs:
    """The flattened input of one draft pass."""

    token_ids: torch.Tensor  # [num_tokens] int32
    positions: torch.Tensor  # [num_tokens] int64
    slot_mapping: torch.Tensor  # [num_tokens] int64
    query_start_loc: torch.Tensor  # [num_reqs + 1] int32, on the CPU
    seq_lens: torch.Tensor  # [num_reqs] int32, on the CPU

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
) -> DraftInputs:
    """The pass that brings the draft's KV up to the target's last emitted token.

    For each request: the verified tokens from ``first_missing`` on, then its next token.
    """
    device = target_token_ids.device
    source: list[int] = []  # where each token stands in target_token_ids
    positions: list[int] = []
    owner: list[int] = []
    lengths: list[int] = []
    for index, (row, start, query_start) in enumerate(zip(rows, first_missing, query_starts, strict=True)):
        offset = query_start - row.first_query_position
        source.extend(range(start + offset, row.next_position + offset))
        source.append(-1)  # the next token, filled in below
        positions.extend(range(start, row.next_position + 1))
        lengths.append(row.next_position + 1 - start)
        owner.extend([index] * lengths[-1])
    query_start_loc = torch.zeros(len(rows) + 1, dtype=torch.int32)
    query_start_loc[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
    token_ids = target_token_ids[torch.tensor(source, device=device).clamp_(min=0)].int()
    token_ids[(query_start_loc[1:].long() - 1).to(device)] = next_token_ids.int()
    position_ids = torch.tensor(positions, device=device)
    return DraftInputs(
        token_ids=token_ids,
        positions=position_ids,
        slot_mapping=slots(block_table, torch.tensor(owner, device=device), position_ids, block_size, max_model_len),
        query_start_loc=query_start_loc,
        seq_lens=torch.tensor([row.next_position + 1 for row in rows], dtype=torch.int32),
    )


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
    )
