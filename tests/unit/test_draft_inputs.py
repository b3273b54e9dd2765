# SPDX-License-Identifier: Apache-2.0
"""Which tokens a draft pass reads and where their KV goes: positions and slots, not only outputs."""

from __future__ import annotations

import random

import pytest
import torch

from vllm_specdecpp.engine.v1.inputs import (
    PADDING_SLOT_ID,
    DraftKV,
    RowBlocks,
    RowState,
    decode_pass,
    first_pass,
    slots,
)

BLOCK_SIZE = 4
MAX_MODEL_LEN = 64


def _block_table(num_reqs: int, seed: int = 0) -> torch.Tensor:
    """Scattered blocks: a slot computed from the wrong row or block is somebody else's."""
    blocks = list(range(1, num_reqs * MAX_MODEL_LEN // BLOCK_SIZE + 1))
    random.Random(seed).shuffle(blocks)
    return torch.tensor(blocks, dtype=torch.int32).view(num_reqs, -1)


def _blocks(table: torch.Tensor | None = None, row: int = 0) -> RowBlocks:
    return RowBlocks((_block_table(1) if table is None else table)[row], BLOCK_SIZE)


def _slot(table: torch.Tensor, row: int, position: int) -> int:
    return int(table[row, position // BLOCK_SIZE]) * BLOCK_SIZE + position % BLOCK_SIZE


def test_slots_follow_the_block_table_and_end_at_max_model_len():
    table = _block_table(2)
    rows, positions = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 5, 63, 64])
    got = slots(table, rows, positions, BLOCK_SIZE, MAX_MODEL_LEN).tolist()
    assert got == [_slot(table, 0, 0), _slot(table, 1, 5), _slot(table, 1, 63), PADDING_SLOT_ID]


def test_a_new_request_is_read_from_the_start_of_its_query():
    row = RowState("a", first_query_position=8, next_position=12)  # 8 cached tokens, 4 read by the target
    assert DraftKV().first_missing(row, _blocks()) == 8


@pytest.mark.parametrize(
    ("num_fed", "accepted", "expected"),
    [
        (1, 0, 11),  # next token and nothing else was read; the recovered token follows it
        (4, 4, 14),  # Y_1..Y_3 were read, Y_4 was drawn last: it and the bonus token are missing
        (4, 3, 14),  # Y_4 was rejected: only the recovered token is missing
        (4, 1, 12),  # the KV of Y_2 and Y_3 is that of rejected tokens
        (5, 4, 15),  # a draft pass had read Y_4 as well
    ],
)
def test_what_is_missing_after_verification(num_fed, accepted, expected):
    kv = DraftKV()
    kv.replace([RowState("a", 3, next_position=10)], [num_fed], [_blocks()])
    row = RowState("a", first_query_position=10, next_position=11 + accepted)
    assert kv.continues(row)
    assert kv.first_missing(row, _blocks()) == expected


def test_a_request_that_was_preempted_or_resumed_is_read_again():
    kv = DraftKV()
    kv.replace([RowState("a", 0, next_position=10)], [5], [_blocks()])
    resumed = RowState("a", first_query_position=0, next_position=11)
    assert not kv.continues(resumed)
    assert kv.first_missing(resumed, _blocks()) == 0


def test_a_request_that_missed_a_round_is_read_again():
    kv = DraftKV()
    kv.replace([RowState("a", 0, next_position=10)], [5], [_blocks()])
    kv.replace([RowState("b", 0, next_position=4)], [2], [_blocks()])
    assert kv.first_missing(RowState("a", first_query_position=10, next_position=12), _blocks()) == 10


def test_first_pass_of_a_mixed_batch():
    table = _block_table(2)
    # "new" was just prefilled (4 tokens read), "old" had 3 candidates verified of which 2 were accepted.
    rows = [RowState("new", 0, 4), RowState("old", 20, 23)]
    target_token_ids = torch.tensor([50, 51, 52, 53, 60, 61, 62, 63])
    (inputs,) = first_pass(
        rows, [0, 22], target_token_ids, [0, 4], torch.tensor([99, 98]), table, BLOCK_SIZE, MAX_MODEL_LEN
    )
    assert inputs.token_ids.tolist() == [50, 51, 52, 53, 99, 62, 98]
    assert inputs.positions.tolist() == [0, 1, 2, 3, 4, 22, 23]
    assert inputs.query_start_loc.tolist() == [0, 5, 7]
    assert inputs.seq_lens.tolist() == [5, 24]
    assert inputs.last_indices.tolist() == [4, 6]
    assert inputs.slot_mapping.tolist() == [
        _slot(table, r, p) for r, p in [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 22), (1, 23)]
    ]


def test_first_pass_of_a_prefill_chunk():
    """Between chunks vLLM's "next token" is a stand-in: it counts as not read, the chunk before it as read."""
    kv = DraftKV()
    kv.replace([RowState("a", 0, next_position=4)], [0], [_blocks()])
    row = RowState("a", first_query_position=4, next_position=8)
    (inputs,) = first_pass(
        [row], [kv.first_missing(row, _blocks())], torch.tensor([14, 15, 16, 17]), [0], torch.tensor([18]),
        _block_table(1), BLOCK_SIZE, MAX_MODEL_LEN,
    )  # fmt: skip
    assert inputs.positions.tolist() == [4, 5, 6, 7, 8]
    assert inputs.token_ids.tolist() == [14, 15, 16, 17, 18]


def test_decode_pass_reads_one_token_a_request():
    table = _block_table(3)
    inputs = decode_pass(torch.tensor([7, 8]), torch.tensor([5, 63]), table[[0, 2]], BLOCK_SIZE, MAX_MODEL_LEN)
    assert inputs.positions.tolist() == [5, 63]
    assert inputs.seq_lens.tolist() == [6, 64]
    assert inputs.slot_mapping.tolist() == [_slot(table, 0, 5), _slot(table, 2, 63)]
    assert inputs.query_start_loc.tolist() == [0, 1, 2]


def test_decode_pass_never_writes_beyond_max_model_len():
    inputs = decode_pass(torch.tensor([7]), torch.tensor([64]), _block_table(1), BLOCK_SIZE, MAX_MODEL_LEN)
    assert inputs.slot_mapping.tolist() == [PADDING_SLOT_ID]
    assert inputs.positions.tolist() == [63]
    assert inputs.seq_lens.tolist() == [64]


@pytest.mark.parametrize("skip", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("max_num_tokens", [None, 6])
def test_every_position_is_written_before_it_is_read(skip: float, max_num_tokens: int | None):
    """A random scheduler over many rounds: what a pass attends to must hold the token that the sequence has there.

    Rounds without a draft pass, preemption and prefix-cached prompts among them.
    """
    rng = random.Random(1)
    num_caught_up = num_resumed = 0
    for _ in range(60):
        kv, table = DraftKV(), _block_table(1, seed=rng.randrange(1000))
        blocks = _blocks(table)
        cache: dict[int, int] = {}  # slot -> token
        sequence = [rng.randrange(1000) for _ in range(rng.randint(1, 9))]
        name, query_start, query = "a", 0, list(sequence)
        sequence.append(rng.randrange(1000))
        while len(sequence) + 8 < MAX_MODEL_LEN:
            row = RowState(name, query_start, len(sequence) - 1)
            candidates: list[int] = []
            ends = rng.random() < 0.15
            if ends or rng.random() < skip:
                kv.replace([row], [None], [blocks])
            else:
                start = kv.first_missing(row, blocks)
                known = tuple(sequence)

                def earlier(_: int, start: int, end: int, known: tuple[int, ...] = known) -> tuple[int, ...]:
                    return known[start:end]

                num_caught_up += start < query_start
                passes = first_pass(
                    [row], [start], torch.tensor(query), [0], torch.tensor([sequence[-1]]), table, BLOCK_SIZE,
                    MAX_MODEL_LEN, earlier, max_num_tokens,
                )  # fmt: skip
                for step in range(rng.randint(1, 6)):
                    if step:
                        passes = [
                            decode_pass(
                                torch.tensor(candidates[-1:]), torch.tensor([len(sequence) + step - 1]), table,
                                BLOCK_SIZE, MAX_MODEL_LEN,
                            )
                        ]  # fmt: skip
                    for inputs in passes:
                        assert max_num_tokens is None or len(inputs.token_ids) <= max_num_tokens
                        for slot, token in zip(inputs.slot_mapping.tolist(), inputs.token_ids.tolist(), strict=True):
                            cache[slot] = token
                        context = [cache[_slot(table, 0, p)] for p in range(int(inputs.seq_lens[0]))]
                        assert context == [*sequence, *candidates][: len(context)]
                    assert len(context) == len(sequence) + len(candidates)
                    candidates.append(rng.randrange(1000))
                kv.replace([row], [len(candidates)], [blocks])
            query_start, query = len(sequence) - 1, [sequence[-1], *candidates]
            sequence += [*candidates[: rng.randint(0, len(candidates))], rng.randrange(1000)]
            if ends:  # the next request has the same first tokens, found in the prefix cache
                name += "a"
                cached = rng.randint(0, (len(sequence) - 1) // BLOCK_SIZE) * BLOCK_SIZE
                query_start, query = cached, sequence[cached:]
                sequence.append(rng.randrange(1000))
                num_resumed += cached > 0
    assert num_resumed > 20 and (num_caught_up > 20) == (skip > 0)


def test_a_batch_is_caught_up_in_passes_of_bounded_size():
    table, tokens = _block_table(3), [list(range(100 * r, 100 * r + 30)) for r in range(3)]
    rows = [RowState("far", 20, 21), RowState("near", 10, 11), RowState("new", 0, 9)]
    queries = [tokens[0][20], tokens[1][10], *tokens[2][:9]]
    passes = first_pass(
        rows, [3, 10, 0], torch.tensor(queries), [0, 1, 2], torch.tensor([tokens[0][21], tokens[1][11], tokens[2][9]]),
        table, BLOCK_SIZE, MAX_MODEL_LEN, lambda row, start, end: tokens[row][start:end], max_num_tokens=8,
    )  # fmt: skip
    read: list[list[int]] = [[], [], []]
    for inputs in passes:
        assert len(inputs.token_ids) <= 8
        counts = inputs.query_start_loc.diff().tolist()
        owners = [r for r, n in zip(inputs.rows.tolist(), counts, strict=True) for _ in range(n)]
        for owner, token, position, slot in zip(
            owners, inputs.token_ids.tolist(), inputs.positions.tolist(), inputs.slot_mapping.tolist(), strict=True
        ):
            read[owner].append(token)
            assert token == tokens[owner][position] and slot == _slot(table, owner, position)
        ends = inputs.positions[inputs.last_indices] + 1
        assert inputs.seq_lens.tolist() == ends.tolist()
    assert read == [tokens[0][3:22], tokens[1][10:12], tokens[2][:10]]
    assert passes[-1].rows.tolist() == [0, 1, 2] and len(passes) > 2
