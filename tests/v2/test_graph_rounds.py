# SPDX-License-Identifier: Apache-2.0
"""The rounds that a GPU would capture, against the oracle: padded batches, metadata made once, buffers reused.

What is replayed is a recording of what ran during the capture (``tests.v2.recorder``); only CUDA itself is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.v2 import harness
from tests.v2.cost_rounds import ScriptedPlay, scripted
from tests.v2.epochs import Epochs
from tests.v2.oracle import Stops
from tests.v2.play import Play
from tests.v2.recorder import RecordingBackend, recording
from vllm_specdecpp.engine.supported import vllm_version
from vllm_specdecpp.engine.v2.graphs import IF_NODES, DraftGraphs

THRESHOLD, MAX_LENGTH = 0.45, 5


def _play(
    tiny: Any, sizes: list[int], seed: int, change: Callable[[Any], None] = lambda s: None, *, cost_aware: bool = False,
    num_steps: int = 16,
) -> tuple[Play, list[bool]]:  # fmt: skip
    """Play with captured rounds; also gives of each replayed round whether its first pass was replayed."""
    from vllm.config import set_current_vllm_config

    if cost_aware:
        config, speculator, _ = scripted(tiny, seed, kernels=True)
    else:
        config, speculator = harness.speculator(
            tiny, rule="confidence", threshold=THRESHOLD, num_speculative_tokens=MAX_LENGTH, kernels=True
        )
    harness.capturable(speculator)
    change(speculator)
    epochs = Epochs()
    epochs.begin()
    backend = RecordingBackend(epochs)
    graphs = DraftGraphs(speculator, IF_NODES, sizes, MAX_LENGTH, backend)
    with recording(backend, speculator), set_current_vllm_config(config):
        graphs.capture()
    speculator.graphs = graphs
    replayed: list[bool] = []
    replay = graphs.replay

    def count(size: int, max_length: int, *, first: bool = True) -> int | None:
        replayed.append(first)
        return replay(size, max_length, first=first)

    graphs.replay = count  # type: ignore[method-assign]
    play = ScriptedPlay(speculator, config, seed) if cost_aware else Play(speculator, config, Stops(THRESHOLD), seed)
    play.run(num_steps)
    return play, replayed


@pytest.mark.parametrize("sizes", [[4], [1, 2]], ids=str)
def test_replayed_drafts_equal_the_oracles(tiny, sizes):
    play, replayed = _play(tiny, sizes, seed=len(sizes))
    # Larger batches run eagerly. Where a prompt is read, the first pass does, and the later ones are replayed.
    assert replayed.count(True) >= 2 and replayed.count(False) >= 2
    assert {0, MAX_LENGTH} <= set(play.lengths)


def test_replayed_cost_aware_drafts_equal_the_oracles(tiny):
    """What decides is loaded before each replay; rounds in which nobody drafts are not replayed."""
    play, replayed = _play(tiny, [4], seed=1, cost_aware=True)
    assert len(replayed) >= 5
    assert {0, MAX_LENGTH} <= set(play.lengths)
    assert isinstance(play, ScriptedPlay) and play.num_checked >= 8
    passes = sum(max([1, *map(len, truth.drafts)]) for truth in play.truths if any(truth.plan.values()))
    assert play.speculator.log.stats()["draft_passes"] == passes + play.num_caught_up


@pytest.mark.parametrize("name", ["rows of a larger batch draft", "what decides is captured, not loaded"])
def test_replay_bugs_of_cost_aware_rounds_are_noticed(tiny, name):
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
def test_replay_bugs_of_padded_batches_are_noticed(tiny, name):
    if name.startswith("rows") and not (vllm_version() or "").startswith("0.32"):
        pytest.skip("vLLM 0.33 clears what a larger batch has left in its block tables")

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


def _host_number(speculator: Any) -> None:
    """Tokens of the first pass are taken from the host: those of the capture for ever."""
    load = speculator._load_short

    def changed(num_reqs: int) -> None:
        load(num_reqs)
        speculator.input_buffers.input_ids[1] = int(speculator._short_tokens[0, 1])

    speculator._load_short = changed


def _own_memory(speculator: Any) -> None:
    """Positions are kept in a tensor that is gone once the capture is."""
    load = speculator._load_candidates

    def changed(num_reqs: int) -> None:
        load(num_reqs)
        speculator.input_buffers.positions[:num_reqs].copy_(kept[0][:num_reqs].copy_(
            speculator.input_buffers.positions[:num_reqs]
        ))  # fmt: skip

    kept = [speculator.input_buffers.positions.clone()]
    prepare = speculator.prepare_capture

    def prepared(size: int) -> Any:
        kept[0] = speculator.input_buffers.positions.clone()  # a new one for each size
        return prepare(size)

    speculator._load_candidates, speculator.prepare_capture = changed, prepared


def _before_its_graph(speculator: Any) -> None:
    """Who goes on is worked out outside the graph, as it was at capture."""
    prepare, load = speculator.prepare_capture, speculator._load_candidates
    running: list[Any] = []

    def prepared(size: int) -> Any:
        made = prepare(size)
        running[:] = [speculator.round.running.clone()]
        return made

    def changed(num_reqs: int) -> None:
        speculator.round.running.copy_(running[0])
        load(num_reqs)

    speculator.prepare_capture, speculator._load_candidates = prepared, changed


@pytest.mark.parametrize("bug", [_host_number, _own_memory, _before_its_graph])
def test_replay_bugs_that_running_the_functions_again_would_hide(tiny, bug):
    with pytest.raises((AssertionError, IndexError)):
        _play(tiny, [2, 4], 1, bug)


def test_a_new_rule_gives_the_captured_rounds_up(tiny):
    play, _ = _play(tiny, [4], seed=1, num_steps=1)
    graphs = play.speculator.graphs
    play.speculator.reconfigure({"threshold": 0.3})
    assert play.speculator.graphs is graphs  # it is read at replay
    play.speculator.reconfigure({"rule": "entropy"})
    assert play.speculator.graphs is None


def test_mode_of_this_machine(tiny):
    _, speculator = harness.speculator(tiny, rule="fixed", num_speculative_tokens=2)
    assert speculator.how_rounds_run() == ("eager", "CUDA graphs need an NVIDIA GPU")
