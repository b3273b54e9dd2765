# SPDX-License-Identifier: Apache-2.0
"""Rounds without a draft pass on V2: what the draft model has not read is known, and read before it drafts again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.planted_bugs import Bugs
from tests.v2 import harness
from tests.v2.cost_rounds import ScriptedPlay, scripted
from tests.v2.oracle import Stops
from tests.v2.play import Play
from vllm_specdecpp.engine.v2.in_flight import DeferredRounds
from vllm_specdecpp.engine.v2.kv import DraftKVGaps, reading_passes


@pytest.mark.parametrize("most", [3, 4, 5, 7, 50])
def test_passes_read_everything_once_and_in_order(most):
    spans = [(0, 9), (5, 5), (30, 41)]
    passes = reading_passes(spans, most)
    for row, (start, end) in enumerate(spans):
        read = [position for taken in passes for position in range(*taken[row])]
        assert read == list(range(start, end))
    for taken in passes:
        assert sum(max(end - start, 1) for start, end in taken) <= most
        assert any(start < end for start, end in taken)
    assert (len(passes) == 1) == (most == 50)
    assert reading_passes([(3, 3)], most) == []


def _scripted_play(tiny: Any, seed: int, plant: Any = None, num_steps: int = 40, **scheduler: bool) -> ScriptedPlay:
    config, speculator, _ = scripted(tiny, seed=seed)
    speculator.max_num_tokens = 40  # what is missing is read in several passes
    if plant is not None:
        plant(speculator.gaps)
    play = ScriptedPlay(speculator, config, seed=seed, caches=True, **scheduler)
    play.run(num_steps)
    return play


@pytest.mark.parametrize(("seed", "books"), [(1, False), (2, True), (3, False)])
def test_every_draft_is_right_after_any_rounds_without_a_pass(tiny, seed, books):
    """The oracle sees what is in each KV slot: prefix-cached blocks, chunks and preemptions among them."""
    play = _scripted_play(tiny, seed, books=books)
    assert play.num_left_out >= 6 and play.num_caught_up >= 8
    assert sum(length > 1 for length in play.lengths) >= 10


def test_requests_without_speculation_leave_no_holes_to_others(tiny):
    """Under any rule a batch that nobody speculates in is not read; later requests may share its blocks."""
    config, speculator = harness.speculator(tiny, rule="confidence", threshold=0.45)
    play = Play(speculator, config, Stops(0.45), seed=6, caches=True)
    for cap in (0, None, 0, None):
        play.caps = [cap]
        play.run(num_steps=15)
    assert play.num_left_out >= 10 and play.num_caught_up >= 2


def test_nothing_is_kept_until_a_pass_is_left_out(tiny):
    config, speculator = harness.speculator(tiny, rule="fixed")
    play = Play(speculator, config, Stops(2.0), seed=3)
    play.run(3)
    play.caps = [0]
    while not play.num_left_out:
        assert speculator.gaps._stale is None and not speculator.gaps._behind
        play.run(1)
    assert speculator.gaps._stale is not None


class _Tables:
    """In the place of vLLM's block tables: request state -> ids of its blocks of four tokens, in the second group."""

    block_sizes, cp_size = (99, 4), 1

    def __init__(self, ids: list[list[int]]) -> None:
        self.block_tables = [None, SimpleNamespace(gpu=torch.tensor(ids, dtype=torch.int32))]

    def compute_slot_mappings(self, states: Any, starts: Any, positions: Any, num_tokens: int) -> torch.Tensor:
        owners = torch.repeat_interleave(torch.arange(len(states)), starts.diff())
        blocks = self.block_tables[1].gpu[states[owners], positions // 4].long()  # type: ignore[union-attr]
        return (blocks * 4 + positions % 4)[None, :num_tokens].expand(2, -1)


def _batch(read: dict[str, tuple[int, int]]) -> Any:
    """A step in which the target has read these positions of these requests."""
    counts = [end - start for start, end in read.values()]
    return SimpleNamespace(
        req_ids=list(read), num_reqs=len(read), num_tokens=sum(counts), idx_mapping=torch.arange(len(read)),
        query_start_loc=torch.tensor([0, *np.cumsum(counts)]), is_prefilling_np=np.zeros(len(read), dtype=bool),
        positions=torch.cat([torch.arange(*span) for span in read.values()]),
        seq_lens_cpu_upper_bound=torch.tensor([end for _, end in read.values()]),
        num_scheduled_tokens=np.array(counts), num_computed_prefill_tokens_np=np.zeros(len(read), dtype=int),
    )  # fmt: skip


def _gaps(tables: Any, read_spans: Any = None, spec: Any = None) -> DraftKVGaps:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    spec = spec or FullAttentionSpec(block_size=4, num_kv_heads=1, head_size=8, dtype=torch.float32)
    layers = [SimpleNamespace(layer_names=["target"]), SimpleNamespace(layer_names=["draft"], kv_cache_spec=spec)]
    return DraftKVGaps(
        SimpleNamespace(
            vllm_config=SimpleNamespace(kv_transfer_config=None), block_tables=tables,
            kv_cache_config=SimpleNamespace(kv_cache_groups=layers, num_blocks=8),
            draft_attn_layer_names={"draft"}, device=torch.device("cpu"), max_num_tokens=99, read_spans=read_spans,
            requests=("a", "b"), on_device=torch.tensor, agree=lambda tensor: tensor, pcp_manager=None,
            log=DeferredRounds(),
        )
    )  # fmt: skip


def test_a_shared_block_that_one_request_has_caught_up_with_hides_nothing_of_another():
    """Both have block 1; b's catching up makes it right, a's own block 2 stays wrong while a sits out."""
    spans: list[Any] = []
    tables = _Tables([[1, 2, 5], [1, 3, 6]])

    def read_spans(batch: Any, taken: Any, bases: Any) -> torch.Tensor:
        spans.append(taken)
        counts = [end - start for start, end in taken]
        positions = torch.cat([torch.arange(*span) for span in taken])
        starts = torch.tensor([0, *np.cumsum(counts)])
        return tables.compute_slot_mappings(batch.idx_mapping, starts, positions, len(positions))

    gaps = _gaps(tables, read_spans)
    gaps.leave_out(_batch({"a": (2, 7), "b": (2, 7)}))
    batch = _batch({"a": (7, 8), "b": (7, 8)})
    gaps.arrive(batch, ())
    assert gaps.missing(["a", "b"]) == [1, 1]
    assert gaps.catch_up(batch, [1], torch.tensor([7, 7])) == [8]  # one token of row 0, to no use
    gaps.read(batch)
    assert gaps.catch_up(batch, [0], torch.tensor([7, 7])) == [4]
    assert spans == [[(0, 0), (0, 7)], [(4, 7), (0, 0)]]
    assert gaps.missing(["a", "b"]) == [0, 0]
    assert gaps._stale is not None and not gaps._stale[:4].any()


def test_what_an_accepted_run_skipped_is_stale_until_it_is_read():
    """Also where the run began with a block, and while others draft; who has no gap has nothing to read."""
    spans: list[Any] = []
    tables = _Tables([[1, 2, 5], [4, 3, 6]])

    def read_spans(batch: Any, taken: Any, bases: Any) -> torch.Tensor:
        spans.append(taken)
        positions = torch.cat([base + torch.arange(*span) for span, base in zip(taken, bases, strict=True)])
        starts = torch.tensor([0, *np.cumsum([end - start for start, end in taken])])
        return tables.compute_slot_mappings(batch.idx_mapping, starts, positions, len(positions))

    gaps = _gaps(tables, read_spans)
    batch = _batch({"a": (4, 8), "b": (4, 8)})
    gaps.arrive(batch, ())
    gaps.have_gaps(batch, {"a": 3, "b": 3}, torch.tensor([True, False]))
    assert gaps._stale is not None
    assert gaps.catch_up(batch, [], torch.tensor([7, 7])) == []
    gaps.read(batch)
    assert gaps._stale.nonzero().flatten().tolist() == [2]
    assert gaps.num_behind(batch, torch.tensor([8, 8])).tolist() == [3, 0]
    gaps.told({"a": 3, "b": 0, "gone": 9})
    assert gaps.missing(["a", "b", "gone"]) == [3, 0, 0]
    batch = _batch({"a": (8, 9), "b": (8, 9)})
    gaps.arrive(batch, ())
    gaps.read(batch)  # what comes behind a gap is as wrong
    assert gaps._stale.nonzero().flatten().tolist() == [2, 5]
    gaps.catch_up(batch, [0, 1], torch.tensor([8, 8]))
    gaps.read(batch)
    assert spans == [[(4, 8), (8, 8)]] and not gaps._stale.any()
    assert gaps.missing(["a", "b"]) == [0, 0]
    # In the step itself the host knows how much it may be, and asks nobody.
    batch = _batch({"a": (4, 8), "b": (4, 8)})
    gaps.arrive(batch, ())
    gaps._speculator.agree = None
    gaps.have_gaps(batch, {"a": 3}, torch.tensor([True, False]))
    assert gaps.catch_up(batch, [0, 1], torch.tensor([7, 7])) == [4]
    gaps.read(batch)
    assert spans[1:] == [[(0, 3), (0, 0)]] and not gaps._stale.any()


def test_what_the_prefix_cache_holds_rightly_is_not_counted_as_missing():
    """The device says so; until it has, all that was cached counts."""
    gaps = _gaps(_Tables([[1, 2, 5], [4, 3, 6]]))
    gaps.leave_out(_batch({"old": (4, 6)}))  # block 2
    batch = _batch({"a": (8, 9), "b": (8, 9)})
    batch.num_computed_prefill_tokens_np = np.array([8, 8])
    gaps.arrive(batch, {"a", "b"})
    assert gaps._behind == {"a": 8, "b": 8}
    assert gaps.missing(["a", "b"]) == [4, 0]
    gaps.read(batch)  # b's new block is right, a's is not
    assert gaps._stale is not None and gaps._stale.nonzero().flatten().tolist() == [2, 5]


def test_where_blocks_change_hands_or_ranks_no_pass_is_left_out():
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    window = SlidingWindowSpec(block_size=4, num_kv_heads=1, head_size=8, dtype=torch.float32, sliding_window=8)
    sharded = _Tables([[1]])
    sharded.cp_size = 2
    usual = _Tables([[1]])
    for gaps, can in ((_gaps(usual, spec=window), False), (_gaps(sharded), False), (_gaps(usual), True)):
        assert gaps.can_catch_up is can
        gaps.leave_out(_batch({"a": (0, 3)}))
        assert (gaps._stale is not None) is can


def test_there_the_first_pass_is_run_for_nobody(tiny):
    config, speculator, rule = scripted(tiny, seed=5)
    speculator.gaps.__dict__["can_catch_up"] = False
    play = ScriptedPlay(speculator, config, seed=5)
    play._reads = lambda names: play._began  # type: ignore[method-assign]
    play.run(num_steps=25)
    assert sum(not any(plan.values()) for plan in rule.plans) >= 4 and play.num_caught_up == 0


MUTATIONS = Bugs()
"""Each is given what keeps account of the draft's KV."""
mutation = MUTATIONS.named


@mutation("what was left out is not marked")
def _(gaps):
    original = gaps._mark
    gaps._mark = lambda batch, stale: original(batch, stale) if stale is not True else None


@mutation("requests that were left out count as up to date")
def _(gaps):
    gaps._grow = lambda *args: None


@mutation("a chunk of a prompt counts as one token, and is forgotten")
def _(gaps):
    original = gaps._grow
    gaps._grow = lambda batch, names=None: original(
        batch,
        [n for i, n in enumerate(batch.req_ids) if (names is None or n in names) and not batch.is_prefilling_np[i]],
    )


@mutation("what comes from the prefix cache counts as right")
def _(gaps):
    original = gaps.arrive
    gaps.arrive = lambda batch, new: original(batch, ())


@mutation("requests that sit out while others draft count as read")
def _(gaps):
    def read(batch: Any) -> None:
        gaps._behind = {}
        DraftKVGaps.read(gaps, batch)

    gaps.read = read


@mutation("nothing is read")
def _(gaps):
    gaps._speculator.read_spans = lambda batch, *_: batch.positions[None, :0]


@mutation("one token short")
def _(gaps):
    original = gaps.catch_up
    gaps.catch_up = lambda batch, rows, ends: original(batch, rows, ends - 1)


@mutation("a block late")
def _(gaps):
    original = gaps._speculator.read_spans
    gaps._speculator.read_spans = lambda batch, spans, bases: original(
        batch, [(min(s + 32, e), e) for s, e in spans], bases
    )


@mutation("the first pass alone")
def _(gaps):
    original = gaps._speculator.read_spans
    read: list[int] = []

    def once(batch: Any, spans: Any, bases: Any) -> Any:
        read.append(id(batch))
        return original(batch, spans if read.count(id(batch)) == 1 else [(0, 0)] * len(spans), bases)

    gaps._speculator.read_spans = once


@mutation("only the first request that wants to draft is read for")
def _(gaps):
    original = gaps.catch_up

    def catch_up(batch: Any, rows: Any, ends: Any) -> list[int]:
        behind = [row for row in rows if batch.req_ids[row] in gaps._behind]
        passes = original(batch, behind[:1], ends)
        for row in behind[1:]:
            gaps._behind.pop(batch.req_ids[row])
        return passes

    gaps.catch_up = catch_up


@mutation("rows are mixed up")
def _(gaps):
    original = gaps._speculator.read_spans
    gaps._speculator.read_spans = lambda batch, spans, bases: original(batch, spans[::-1], bases)


def test_the_play_notices_nothing_without_a_bug(tiny):
    _scripted_play(tiny, seed=8, num_steps=60)


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_play_notices(tiny, name):
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        _scripted_play(tiny, 8, MUTATIONS[name], num_steps=60)
