# SPDX-License-Identifier: Apache-2.0
"""What a captured pass is made of: nothing that a CUDA graph cannot replay, not more than so many launches, and no
kernel that was not compiled before the capture."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.v2 import harness
from tests.v2.epochs import Epochs
from tests.v2.recorder import RecordingBackend, recording
from vllm_specdecpp.decision.cost_aware.tail import CostAwareTail
from vllm_specdecpp.decision.rules import make_estimator
from vllm_specdecpp.engine.v2.graphs import PER_PASS, DraftGraphs
from vllm_specdecpp.engine.v2.round import DeviceRound
from vllm_specdecpp.kernels.cost_aware_tail import cost_aware_tail

K = 3
ALLOWED = {
    "aten._to_copy.default", "aten.add.Tensor", "aten.add.out", "aten.argmax.default", "aten.clamp.default",
    "aten.clamp_.default", "aten.clone.default", "aten.contiguous.default",
    "aten.copy_.default", "aten.exp.default", "aten.fill_.Scalar",
    "aten.gather.default", "aten.gt.Scalar", "aten.mul.Tensor", "aten.mul.out", "aten.neg.default",
    "aten.new_empty.default", "aten.scalar_tensor.default", "aten.scatter_.src", "aten.stack.default",
    "aten.sub.Tensor", "aten.sub.out", "aten.to.dtype", "aten.where.self", "aten.zeros.default",
}  # fmt: skip
"""Each queues device work of a size that depends on shapes alone; none draws from a generator that the host keeps, and
none brings anything to the host."""
MOST_LAUNCHES = {"first": 23, "later": 25}
"""Of one pass, beside the model and its metadata: aten calls, three of them the oracle's lm_head, and kernels."""


def _captured(tiny: Any, change: Callable[[Any], None] = lambda s: None, **options: Any) -> RecordingBackend:
    from vllm.config import set_current_vllm_config

    config, speculator = harness.speculator(tiny, **{"num_speculative_tokens": K, "kernels": True, **options})
    harness.capturable(speculator)
    change(speculator)
    epochs = Epochs()
    epochs.begin()
    backend = RecordingBackend(epochs)
    with recording(backend, speculator), set_current_vllm_config(config):
        DraftGraphs(speculator, PER_PASS, [2], K, backend).capture()
    return backend


def _check(backend: RecordingBackend) -> None:
    passes = [[call.name for call in graph.calls()] for graph in backend.graphs]
    kernels = {name for names in passes for name in names if not name.startswith("aten.")}
    assert kernels >= {"draft model"}
    foreign = {name for names in passes for name in names if name.startswith("aten.")} - ALLOWED
    assert not foreign, foreign
    for names, kind in zip(passes, ["first", *["later"] * (K - 1)], strict=True):
        assert len(names) - 1 <= MOST_LAUNCHES[kind], (kind, len(names), names)


@pytest.mark.parametrize(
    "options",
    [{"rule": "fixed"}, {"rule": "confidence", "threshold": 0.5}, {"rule": "entropy", "threshold": 0.5},
     {"rule": "cost_aware"}, {"rule": "confidence", "draft_sample_method": "probabilistic"}],
    ids=lambda o: "-".join(map(str, o.values())),
)  # fmt: skip
def test_allowed_calls_and_their_number(tiny, options):
    _check(_captured(tiny, **options))


def _random(speculator: Any) -> None:
    load = speculator._load_candidates
    speculator._load_candidates = lambda n: (load(n), speculator.round.scores.uniform_())


def _to_host(speculator: Any) -> None:
    load = speculator._load_candidates
    speculator._load_candidates = lambda n: (load(n), speculator.round.any_running.item())


def _shape_by_value(speculator: Any) -> None:
    load = speculator._load_candidates
    speculator._load_candidates = lambda n: (load(n), speculator.round.running.nonzero())


def _many(speculator: Any) -> None:
    load = speculator._load_candidates
    speculator._load_candidates = lambda n: [load(n) for _ in range(3)]


@pytest.mark.parametrize("bug", [_random, _to_host, _shape_by_value, _many])
def test_allowed_calls_bugs_are_noticed(tiny, bug):
    with pytest.raises(AssertionError):
        _check(_captured(tiny, bug, rule="confidence", threshold=0.5))


@contextlib.contextmanager
def specialisations(keys: set[Any], *, run: bool) -> Iterator[None]:
    """Collect what Triton would compile each launch for: constants, and what it reads off the other arguments."""
    from triton.runtime.interpreter import InterpretedFunction

    launch = InterpretedFunction.run

    def noted(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        given = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        plain = set(self.kwargs.get("do_not_specialize") or ())
        keys.add((self.__name__, *((name, _read(name, value, name in plain)) for name, value in given.items())))
        return launch(self, *args, grid=grid, warmup=warmup, **kwargs) if run else None

    InterpretedFunction.run = noted
    try:
        yield
    finally:
        InterpretedFunction.run = launch


def _read(name: str, value: Any, plain: bool) -> Any:
    """As ``triton.runtime.jit``: of a pointer its type and alignment, of a number if it is 1 or a multiple of 16."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.data_ptr() % 16 == 0
    if name.isupper() or isinstance(value, bool) or not isinstance(value, int):
        return value  # a constexpr, an option
    return "int" if plain else ("int", value == 1, value % 16 == 0)


def _tail_keys(most: int, sizes: list[int] | None) -> set[Any]:
    """Of the cost-aware tail at these batch sizes; None: of the warm-up."""
    tail = CostAwareTail(make_estimator(None), most, K, 64, "cpu", cost_aware_tail)
    round_ = DeviceRound(torch.zeros(most, K, dtype=torch.int64))
    round_.set_rule(tail, 1)
    keys: set[Any] = set()
    with specialisations(keys, run=False):
        if sizes is None:
            round_.warm()
        for size in sizes or ():
            round_.begin()
            for _ in range(K):
                round_._scored = True
                round_.append(round_.token_ids[:size], slice(size))
    return keys


@pytest.mark.parametrize("most", [1, 4, 48, 300, 1024])
def test_specialisation_of_every_batch_size_is_warmed(most):
    rnd = random.Random(most)
    sizes = [1, most, *(rnd.randint(1, most) for _ in range(60))]
    met, warmed = _tail_keys(most, sizes), _tail_keys(most, None)
    assert met <= warmed and len(warmed) <= 6


def test_specialisation_bug_of_a_size_that_is_not_warmed(monkeypatch):
    monkeypatch.setattr(DeviceRound, "warm", lambda self: (self.begin(), self.append(self.token_ids[:64], slice(64))))
    with pytest.raises((AssertionError, RuntimeError)):
        test_specialisation_of_every_batch_size_is_warmed(300)


def test_specialisation_of_a_round_is_met_before_its_capture(tiny):
    """Every kernel of a replayed round was compiled by the passes that run before the capture."""
    from vllm.config import set_current_vllm_config

    config, speculator = harness.speculator(tiny, rule="cost_aware", num_speculative_tokens=K, kernels=True)
    harness.capturable(speculator)
    warmed: set[Any] = set()
    captured: set[Any] = set()
    epochs = Epochs()
    epochs.begin()
    backend = RecordingBackend(epochs)
    prepare, sizes = speculator.prepare_capture, [1, 2, 4]
    prepared: list[int] = []
    with contextlib.ExitStack() as stack, set_current_vllm_config(config), recording(backend, speculator):
        stack.enter_context(specialisations(warmed, run=True))

        def counted(size: int) -> Any:
            prepared.append(size)
            if len(prepared) == len(sizes) + 1:  # the captures begin
                stack.close()
                stack.enter_context(specialisations(captured, run=True))
            return prepare(size)

        speculator.prepare_capture = counted
        DraftGraphs(speculator, PER_PASS, sizes, K, backend).capture()
    assert prepared == [4, 2, 1, 4, 2, 1] and captured <= warmed and len(captured) >= 3


def test_specialisation_of_every_prompt_is_warmed(tiny):
    """vLLM's kernel that prepares a prompt's reading, whose block goes by the longest prompt of the step."""
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import prepare_prefill_inputs

    _, speculator = harness.speculator(tiny, rule="cost_aware", num_speculative_tokens=K, kernels=True)
    buffers = speculator.input_buffers
    warmed: set[Any] = set()
    met: set[Any] = set()
    with specialisations(warmed, run=True):
        speculator.warm_prefill()
    none = torch.zeros(2, dtype=torch.int32)
    with specialisations(met, run=False):
        for length in range(1, speculator.max_num_tokens // 2):
            prepare_prefill_inputs(
                buffers, InputBatch.make_dummy(2, 2 * length, buffers), torch.zeros(2, 1, dtype=torch.int64), none,
                speculator.expanded_input_ids, speculator.expanded_positions, speculator.last_token_indices,
                speculator.max_num_reqs, speculator.max_model_len,
            )  # fmt: skip
    assert met <= warmed and len(met) > 3


def test_specialisation_reads_what_triton_reads():
    """The test's power: a number that is not kept out of the key makes one for 1, for multiples of 16, for the rest."""
    keys: set[Any] = set()
    for value in (1, 3, 16, 32, 7):
        keys.add(_read("num", value, False))
    assert len(keys) == 3 and {_read("num", value, True) for value in (1, 3, 16)} == {"int"}
    assert _read("x", torch.zeros(8)[1:], False) != _read("x", torch.zeros(8), False)
