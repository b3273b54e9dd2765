# SPDX-License-Identifier: Apache-2.0
"""A capture that fails leaves a clean state, on every rank the same; an error that the device keeps is raised."""

from __future__ import annotations

import contextlib
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.v2 import harness
from tests.v2.epochs import EpochBackend, Epochs
from vllm_specdecpp.engine.v2 import capture, graphs

K = 2


@pytest.fixture
def rank(tiny, monkeypatch) -> Callable[..., Any]:
    """Makes a rank's speculator, which captures with the given backend."""
    monkeypatch.setattr(capture, "graph_capture", lambda device: contextlib.nullcontext())

    def make(backend: EpochBackend, mode: str = graphs.PER_PASS) -> Any:
        _, speculator = harness.speculator(tiny, rule="fixed", num_speculative_tokens=K)
        harness.capturable(speculator)
        speculator._backend = lambda: backend
        speculator.graph_mode = lambda: (mode, "asked for by the test")
        return speculator

    return make


def _epochs() -> Epochs:
    epochs = Epochs()
    epochs.begin()
    return epochs


def _capture(speculator: Any) -> None:
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(speculator.vllm_config):
        speculator.capture()


@pytest.mark.parametrize("fail_at", [1, 4])
def test_capture_fails_and_rounds_run_eagerly(rank, fail_at):
    backend = EpochBackend(_epochs(), fail_at=fail_at)
    speculator = rank(backend)
    _capture(speculator)
    assert speculator.graphs is None and backend.num_recovered == 1 and not backend.capturing
    mode, reason = speculator.how_rounds_run()
    assert mode == graphs.EAGER and reason.startswith("capture failed: CUDA error: operation failed due to")


def test_capture_fails_after_one_that_did_not(rank):
    """A second start's failure does not bring back what the first one captured."""
    speculator = rank(EpochBackend(_epochs()))
    _capture(speculator)
    assert speculator.graphs is not None and "graphs of up to 4 requests" in speculator.how_rounds_run()[1]
    speculator._backend = lambda: EpochBackend(_epochs(), fail_at=2)
    _capture(speculator)
    assert speculator.graphs is None


def test_capture_fails_and_the_device_is_lost(rank):
    """Rounds without graphs would fail as well, later and without a reason: it is raised now."""
    speculator = rank(EpochBackend(_epochs(), fail_at=2, lost=True))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        _capture(speculator)
    assert speculator.graphs is None


def test_capture_fails_at_the_probe_of_if_nodes_alone(rank):
    """One tiny graph tells, before anything of the model is captured; a graph a pass needs no IF nodes."""
    backend = EpochBackend(_epochs(), fail_at=1)
    speculator = rank(backend, graphs.IF_NODES)
    _capture(speculator)
    assert speculator.graphs is not None and speculator.graphs.mode == graphs.PER_PASS
    assert backend.num_recovered == 1
    mode, reason = speculator.how_rounds_run()
    assert mode == graphs.PER_PASS and reason.startswith("IF nodes do not work here: CUDA error")


class TwoRanks:
    """A MIN over two threads in the place of ``torch.distributed``."""

    def __init__(self) -> None:
        self._values: list[int] = []
        self._met = threading.Barrier(2, timeout=60)

    def all_reduce(self, flag: torch.Tensor, op: Any, group: Any) -> None:
        assert op == torch.distributed.ReduceOp.MIN
        self._values.append(int(flag))
        self._met.wait()
        flag.fill_(min(self._values))


def _both_capture(rank: Any, monkeypatch: Any) -> list[str]:
    """The modes of two ranks, of which the second fails to capture."""
    from vllm.config import set_current_vllm_config

    backends = [EpochBackend(_epochs()), EpochBackend(_epochs(), fail_at=3)]
    speculators = [rank(backend) for backend in backends]
    group = TwoRanks()
    monkeypatch.setattr(torch.distributed, "all_reduce", group.all_reduce)
    monkeypatch.setattr(capture, "get_tp_group", lambda: types.SimpleNamespace(cpu_group=None))
    one_at_a_time = threading.Lock()  # Triton's interpreter is no better than that
    captures = graphs.DraftGraphs.capture

    def capture_in_turn(self: graphs.DraftGraphs) -> None:
        with one_at_a_time:
            captures(self)

    monkeypatch.setattr(graphs.DraftGraphs, "capture", capture_in_turn)
    for speculator in speculators:
        speculator._num_ranks = 2
        speculator.agree = lambda tensor: tensor
    threads = [threading.Thread(target=speculator.capture) for speculator in speculators]
    with set_current_vllm_config(speculators[0].vllm_config):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
            assert not thread.is_alive()
    assert [s.graphs is None for s in speculators] == [s.how_rounds_run()[0] == graphs.EAGER for s in speculators]
    return [s.how_rounds_run()[0] for s in speculators]


def test_capture_fails_on_one_of_two_ranks(rank, monkeypatch):
    assert _both_capture(rank, monkeypatch) == [graphs.EAGER, graphs.EAGER]


def _alone(monkeypatch: Any) -> None:
    monkeypatch.setattr(capture.CapturedRounds, "_all_ranks", lambda self, succeeded: succeeded)


def _swallows(monkeypatch: Any) -> None:
    """What was said before: any error is a reason for eager rounds."""

    def attempt(backend: Any, run: Any) -> str | None:
        try:
            run()
        except RuntimeError as error:
            return str(error)
        return None

    monkeypatch.setattr(capture.CapturedRounds, "_attempt", staticmethod(attempt))


def test_capture_fails_bug_of_ranks_that_do_not_agree(rank, monkeypatch):
    _alone(monkeypatch)
    assert len(set(_both_capture(rank, monkeypatch))) == 2


@pytest.mark.parametrize("test", [test_capture_fails_and_the_device_is_lost])
def test_capture_fails_bug_of_an_error_that_is_swallowed(rank, monkeypatch, test):
    _swallows(monkeypatch)
    with pytest.raises(pytest.fail.Exception):
        test(rank)


def test_capture_fails_bug_of_a_capture_that_stays_open(rank, monkeypatch):
    _swallows(monkeypatch)
    with pytest.raises(AssertionError):
        test_capture_fails_and_rounds_run_eagerly(rank, 4)
