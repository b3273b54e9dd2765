# SPDX-License-Identifier: Apache-2.0
"""The memory of logits: bytes, bounds, the default K, and refusals that name their options."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllm_specdecpp.engine.shared import logits_memory
from vllm_specdecpp.engine.shared.logits_memory import LogitsMemory, lengths_by_batch, longest_that_fits

GIB = 2**30
LLAMA: dict[str, Any] = {
    "max_num_seqs": 1024, "length": 20, "vocab_size": 128_256, "dtype": torch.bfloat16, "max_num_batched_tokens": 8192,
    "keeps_draft_logits": True,
}  # fmt: skip


def test_memory_of_the_reviews_examples():
    memory = LogitsMemory(**LLAMA)
    assert memory.draft == 1024 * 20 * 128_256 * 2 and round(memory.draft / 1e9, 1) == 5.3
    memory = LogitsMemory(**{**LLAMA, "max_num_seqs": 256, "keeps_draft_logits": False})
    assert memory.draft == 0 and memory.rows == 256 * 21
    logits = memory.verification - memory.chunk_rows * 128_256 * 4
    assert logits == 256 * 21 * 128_256 * 2 and round(logits / 1e9, 1) == 1.4
    assert "0.00 GiB" in memory.describe() and "5376 rows" in memory.describe()


def test_memory_of_a_verification_is_bounded():
    """By the tokens of a step, by what is booked, and the sampler's copy by vLLM's chunk."""
    from vllm.v1.worker.gpu.spec_decode import rejection_sampler

    assert logits_memory.CHUNK == rejection_sampler.MAX_CHUNK_BYTES
    memory = LogitsMemory(**LLAMA)
    assert memory.rows == 8192
    assert memory.chunk_rows == rejection_sampler.get_max_chunk_logits(128_256)
    assert LogitsMemory(**LLAMA, booked=4000).rows == 4000
    small = LogitsMemory(**{**LLAMA, "max_num_seqs": 2})
    assert small.rows == small.chunk_rows == 42


def test_memory_of_logits_that_ranks_put_together():
    """vLLM's all-gather holds each rank's part, all parts, and these in the order of the vocabulary."""
    logits = 8192 * 128_256 * 2
    assert LogitsMemory(**LLAMA, ranks=4).verification == 2 * logits + logits // 4
    few = {**LLAMA, "max_num_seqs": 2}
    assert LogitsMemory(**few, ranks=2).verification == LogitsMemory(**few).verification  # the copy takes more


@pytest.mark.parametrize("change", [{"length": 21}, {"max_num_seqs": 1025}, {"vocab_size": 200_000}])
def test_memory_grows_with_each_of_its_factors(change):
    before, after = LogitsMemory(**LLAMA), LogitsMemory(**{**LLAMA, **change})
    assert after.draft > before.draft
    assert LogitsMemory(**{**LLAMA, "dtype": torch.float32}).draft == 2 * before.draft


def test_memory_that_is_not_there_is_refused_with_the_options():
    memory = LogitsMemory(**LLAMA)
    memory.check(memory.draft + memory.verification)
    with pytest.raises(ValueError) as caught:
        memory.check(memory.draft + memory.verification - 1)
    message = str(caught.value)
    assert message.startswith("specdecpp: num_speculative_tokens=20 with max_num_seqs=1024") and "\n" not in message
    assert "lower num_speculative_tokens or --max-num-seqs" in message


def test_memory_is_held_while_vllm_measures_it(monkeypatch):
    """What is allocated then is what a verification takes; where there is not so much, the options are named."""
    taken = []
    empty = torch.empty

    def counted(size: int, dtype: torch.dtype, device: Any = None) -> torch.Tensor:
        taken.append(size * dtype.itemsize)
        return empty(1)

    memory = LogitsMemory(**LLAMA)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", counted)
        memory.hold(torch.device("cpu"))
    assert sum(taken) == memory.verification

    def none_left(*_: Any, **__: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", none_left)
        patch.setattr(torch.accelerator, "get_memory_info", lambda: (GIB, 80 * GIB))
        with pytest.raises(ValueError, match="num_speculative_tokens=20.*1.00 GiB"):
            memory.hold(torch.device("cpu"))


@pytest.mark.parametrize("room", [0.1, 1, 2, 3, 5, 40])
def test_memory_bounds_the_default_length(room):
    memory = LogitsMemory(**{**LLAMA, "length": 10})
    length = longest_that_fits(memory, int(room * GIB))
    fits = [
        n for n in range(1, 11)
        if (m := LogitsMemory(**{**LLAMA, "length": n})).draft + m.verification <= room * GIB
    ]  # fmt: skip
    assert length == max(fits, default=1)


@pytest.mark.parametrize(
    ("widest", "length", "tokens"), [*itertools.product((1, 4, 256, 1024), (1, 3, 10, 20), (512, 2048, 8192))]
)
def test_memory_and_tokens_that_are_booked_are_bounded(widest, length, tokens):
    """At most half of a step is booked, unless one candidate each is too much; the table covers every batch, once."""
    from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

    table = lengths_by_batch(widest, length, tokens)
    lookup = build_dynamic_sd_schedule_lookup(table, widest, length)
    assert table[0][0] == 1 and table[-1][1] == widest
    for batch in range(1, widest + 1):
        (mine,) = (k for fewest, most, k in table if fewest <= batch <= most)
        assert lookup[batch] == mine
        assert mine == 1 or batch * (mine + 1) <= tokens // 2
        doubled = next((k for k in _halvings(length) if k > mine and batch * (k + 1) <= tokens // 2), None)
        assert doubled is None  # the longest that there is


def _halvings(length: int) -> list[int]:
    found = [length]
    while found[-1] > 1:
        found.append(found[-1] // 2)
    return found


def _one_length(patch: Any) -> None:
    patch.setattr(logits_memory, "lengths_by_batch", lambda widest, length, _: [(1, widest, length)])


def _no_sampler_copy(patch: Any) -> None:
    patch.setattr(LogitsMemory, "chunk_rows", 0)


def _all_sequences(patch: Any) -> None:
    patch.setattr(LogitsMemory, "rows", property(lambda self: self.max_num_seqs * (self.length + 1)))


@pytest.mark.parametrize("bug", [_no_sampler_copy, _all_sequences])
def test_memory_bugs_are_noticed(monkeypatch, bug: Callable[[Any], None]):
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        test_memory_of_a_verification_is_bounded()


def test_memory_bug_of_one_length_for_all_batches(monkeypatch):
    _one_length(monkeypatch)
    with pytest.raises(AssertionError):
        monkeypatch.setitem(globals(), "lengths_by_batch", logits_memory.lengths_by_batch)
        test_memory_and_tokens_that_are_booked_are_bounded(256, 20, 8192)


@pytest.mark.parametrize(("room", "moves"), [(4 * 2 * 16, True), (4 * 2 * 16 - 1, False)])
def test_memory_of_searched_tokens_is_taken_as_far_as_there_is_room(monkeypatch, room: int, moves: bool):
    from types import SimpleNamespace

    from vllm_specdecpp.engine.v2 import free_runs

    monkeypatch.setattr(free_runs, "StagedWriteTensor", lambda shape, dtype, device: torch.zeros(shape, dtype=dtype))
    states: Any = SimpleNamespace(max_num_reqs=2, max_model_len=16, device=torch.device("cpu"), all_token_ids=None)
    free_runs.hold_tokens(states, room=room)
    assert (states.all_token_ids is not None) == moves
