# SPDX-License-Identifier: Apache-2.0
"""The rounds that a GPU would capture, against the oracle: padded batches, metadata made once, buffers reused.

What a replay runs is run here as the functions that a capture would record; only CUDA itself is missing.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest

from tests.v2 import harness
from tests.v2.cost_rounds import ScriptedPlay, scripted
from tests.v2.oracle import Stops
from tests.v2.play import Play
from vllm_specdecpp.engine.v2.graphs import IF_NODES, DraftGraphs

THRESHOLD, MAX_LENGTH = 0.45, 5


class Functions:
    """A backend whose graphs are the functions that were to be recorded."""

    def replay(self, graph: Any) -> None:
        first, later, any_running, max_length = graph
        first()
        for step in range(2, max_length + 1):
            if bool(any_running):  # an IF node's own question
                later(step)


class Rounds(DraftGraphs):
    """Keeps what is captured as functions."""

    def _capture_round(self, first: Callable[[], None], later: Callable[[int], None]) -> list[Any]:
        return [(first, later, self._rounds.any_running, self._max_length)]


def _model_state() -> Any:
    """Makes attention metadata from a dummy batch, as a runner's model state does."""
    from vllm.v1.worker.gpu.attn_utils import build_attn_metadata

    def prepare_attn(
        batch: Any, mode: Any, tables: Any, slots: Any, groups: Any, config: Any, for_capture: bool
    ) -> Any:
        import torch

        assert for_capture
        return build_attn_metadata(
            attn_groups=groups, num_reqs=batch.num_reqs, num_tokens=batch.num_tokens,
            query_start_loc_gpu=batch.query_start_loc, query_start_loc_cpu=torch.from_numpy(batch.query_start_loc_np),
            max_query_len=batch.num_tokens // batch.num_reqs, seq_lens=batch.seq_lens, max_seq_len=256,
            block_tables=tables, slot_mappings=slots, kv_cache_config=config,
        )  # fmt: skip

    return types.SimpleNamespace(prepare_attn=prepare_attn)


def _play(
    tiny: Any, sizes: list[int], seed: int, change: Callable[[Any], None] = lambda s: None, *, cost_aware: bool = False
) -> tuple[Play, int]:
    """Play with captured rounds; also gives how many of the rounds were replayed."""
    from vllm.config import set_current_vllm_config

    if cost_aware:
        config, speculator, _ = scripted(tiny, seed)
    else:
        config, speculator = harness.speculator(
            tiny, rule="confidence", threshold=THRESHOLD, num_speculative_tokens=MAX_LENGTH
        )
    speculator.model_state = _model_state()
    for groups in speculator.attn_groups:
        for group in groups:
            group.update_draft_decode_metadata = lambda metadata: None
    graphs = Rounds(speculator, IF_NODES, sizes, MAX_LENGTH, Functions())  # type: ignore[arg-type]
    with set_current_vllm_config(config):
        graphs.capture()
    speculator.graphs = graphs
    change(speculator)
    replayed = [0]
    replay = graphs.replay

    def count(size: int, max_length: int) -> int | None:
        replayed[0] += 1
        return replay(size, max_length)

    graphs.replay = count  # type: ignore[method-assign]
    play = ScriptedPlay(speculator, config, seed) if cost_aware else Play(speculator, config, Stops(THRESHOLD), seed)
    play.run(num_steps=25)
    return play, replayed[0]


@pytest.mark.parametrize("sizes", [[4], [1, 2, 4], [2]], ids=str)
def test_drafts_equal_the_oracles(tiny, sizes):
    play, replayed = _play(tiny, sizes, seed=len(sizes))
    assert replayed >= (5 if 4 in sizes else 2)  # larger batches run eagerly
    assert {0, MAX_LENGTH} <= set(play.lengths)


@pytest.mark.parametrize("sizes", [[4], [1, 2]], ids=str)
def test_cost_aware_drafts_equal_the_oracles(tiny, sizes):
    """What decides is loaded before each replay; rounds in which nobody drafts are not replayed."""
    play, replayed = _play(tiny, sizes, seed=len(sizes), cost_aware=True)
    assert replayed >= (5 if 4 in sizes else 2)
    assert {0, MAX_LENGTH} <= set(play.lengths)
    assert isinstance(play, ScriptedPlay) and play.num_checked >= 15
    passes = sum(max([1, *map(len, truth.drafts)]) for truth in play.truths if any(truth.plan.values()))
    assert play.speculator.log.stats()["draft_passes"] == passes + play.num_caught_up


@pytest.mark.parametrize("name", ["rows of a larger batch draft", "what decides is captured, not loaded"])
def test_bugs_of_captured_cost_aware_rounds_are_noticed(tiny, name):
    def padding_runs(speculator: Any) -> None:
        start = speculator._tail.start

        def changed(max_lengths: Any, running: Any) -> None:
            start(max_lengths, running)
            running[(max_lengths == 0).nonzero()] = 1

        speculator._tail.start = changed

    def kept(speculator: Any) -> None:
        params = speculator._tail.params.packed.clone()
        speculator.round.admit = lambda: (
            speculator._tail.params.packed.copy_(params),
            speculator._tail.start(speculator.round.max_lengths, speculator.round.running),
        )

    with pytest.raises((AssertionError, IndexError)):
        _play(tiny, [4], 1, padding_runs if name.startswith("rows") else kept, cost_aware=True)


@pytest.mark.parametrize("name", ["rows of a larger batch go on drafting", "no slots for the later passes"])
def test_bugs_of_padded_batches_are_noticed(tiny, name):
    def padding_runs(speculator: Any) -> None:
        start = speculator.round.start

        def changed(num_reqs: int, *args: Any) -> None:
            start(num_reqs, *args)
            speculator.round.running[num_reqs:] = 1
            speculator.round.max_lengths[num_reqs:] = MAX_LENGTH

        speculator.round.start = changed

    def no_slots(speculator: Any) -> None:
        slots = speculator.block_tables.slot_mappings
        speculator._map_slots = lambda size, query_len: slots[:, : size * query_len]  # those of the last pass

    with pytest.raises((AssertionError, IndexError)):
        _play(tiny, [4], 1, padding_runs if name.startswith("rows") else no_slots)


def test_a_new_rule_gives_the_captured_rounds_up(tiny):
    play, _ = _play(tiny, [4], seed=1)
    graphs = play.speculator.graphs
    play.speculator.reconfigure({"threshold": 0.3})
    assert play.speculator.graphs is graphs  # it is read at replay
    play.speculator.reconfigure({"rule": "entropy"})
    assert play.speculator.graphs is None


def test_mode_of_this_machine(tiny):
    _, speculator = harness.speculator(tiny, rule="fixed", num_speculative_tokens=2)
    assert speculator.how_rounds_run() == ("eager", "CUDA graphs need an NVIDIA GPU")


def test_graphs_of_another_kv_cache_are_given_up(tiny):
    """vLLM captures once with a small KV cache, to measure memory, and then frees that cache."""
    from vllm.config.compilation import CUDAGraphMode

    play, _ = _play(tiny, [4], seed=1)
    play.speculator.init_cudagraph_manager(CUDAGraphMode.NONE)
    assert play.speculator.graphs is None
