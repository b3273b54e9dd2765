# SPDX-License-Identifier: Apache-2.0
"""Limits of requests, and the accounting that waits for no device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_specdecpp.engine.v2.in_flight import DeferredRounds
from vllm_specdecpp.engine.v2.requests import NUM_STOP_TOKENS, BatchRequests


def _params(**options: Any) -> SimpleNamespace:
    return SimpleNamespace(**{
        "extra_args": None, "max_tokens": 10, "eos_token_id": None, "stop_token_ids": [], "seed": None, **options,
    })  # fmt: skip


def _row(params: Any, bound: int = 8, prompt_len: int = 5, max_model_len: int = 100) -> list[int]:
    requests = BatchRequests()
    requests.add("a", prompt_len, params)
    return requests.table(["a"], bound, max_model_len)[0].tolist()


@pytest.mark.parametrize(
    ("extra_args", "bound", "wanted"),
    [
        (None, 8, 8),
        ({"specdecpp": {"enabled": False}}, 8, 0),
        ({"specdecpp": "off"}, 8, 0),
        ({"specdecpp": {"num_speculative_tokens": 3}}, 8, 3),
        ({"specdecpp": {"num_speculative_tokens": 30}}, 8, 8),
        ({"specdecpp": {"num_speculative_tokens": 3}}, 0, 0),
        ({"specdecpp": "nonsense"}, 8, 8),  # refused on admission; if it slips through, nothing breaks
    ],
)
def test_caps(extra_args, bound, wanted):
    assert _row(_params(extra_args=extra_args), bound)[0] == wanted


def test_ends():
    assert _row(_params(), prompt_len=5)[1] == 15
    assert _row(_params(), prompt_len=95)[1] == 100
    assert _row(_params(max_tokens=None))[1] == 100


@pytest.mark.parametrize(
    ("eos", "others", "wanted"), [(None, [], []), (2, [], [2]), (7, [9, 4, 7], [7, 4, 9]), (None, None, [])]
)
def test_stop_tokens(eos, others, wanted):
    stops = _row(_params(eos_token_id=eos, stop_token_ids=others))[2:]
    assert stops == wanted + [-1] * (NUM_STOP_TOKENS - len(wanted))


def test_more_stop_tokens_than_fit_keep_the_end_of_sequence():
    stops = _row(_params(eos_token_id=99, stop_token_ids=list(range(50))))[2:]
    assert stops == [99, *range(NUM_STOP_TOKENS - 1)]


def test_unknown_requests_have_the_engines_limits():
    row = BatchRequests().table(["dummy"], 8, 100)[0].tolist()
    assert row == [8, 100] + [-1] * NUM_STOP_TOKENS


def test_scheduler_outputs_come_and_go():
    requests = BatchRequests()
    off = _params(extra_args={"specdecpp": "off"})
    new = [SimpleNamespace(req_id=r, prompt_len=3, sampling_params=p) for r, p in (("a", off), ("b", _params()))]
    pooling = SimpleNamespace(req_id="c", prompt_len=3, sampling_params=None)
    requests.update(SimpleNamespace(finished_req_ids=set(), scheduled_new_reqs=[*new, pooling]))
    assert requests.all_off(["a"])
    assert not requests.all_off(["a", "b"]) and not requests.all_off(["unknown"])
    requests.update(SimpleNamespace(finished_req_ids={"a"}, scheduled_new_reqs=[]))
    assert not requests.all_off(["a"])
    assert requests.take_finished() == ["a"] and requests.take_finished() == []


class _Event:
    """Stands for a copy that arrives when told to."""

    def __init__(self) -> None:
        self.arrived = False

    def query(self) -> bool:
        return self.arrived

    def synchronize(self) -> None:
        self.arrived = True


def _step(log: DeferredRounds, request: str, numbers: list[int], *, prefill: bool = False) -> None:
    num_candidates = sum(number >= 0 for number in numbers[3:])
    log.note([request], [prefill], [], torch.tensor([[*numbers[:2], 9, 0, 0, *numbers[2:]]]), max(1, num_candidates))


def test_rounds_are_put_together_from_two_steps():
    log = DeferredRounds(trace_rounds=10)
    _step(log, "a", [1, 0, 50, 11, 12, -1], prefill=True)  # tokens sampled, rejected, the last one, the candidates
    _step(log, "a", [2, 1, 51, 21, -1, -1])
    _step(log, "a", [2, 2, 52, -1, -1, -1])  # booked: room for two more
    _step(log, "a", [1, 0, 53, 31, 32, 33])
    _step(log, "a", [3, 0, 54, -1, -1, -1])  # the scheduler submitted two of three
    keys = ("candidates", "accepted", "next_token")
    assert [tuple(r[k] for k in keys) for r in log.rounds()] == [
        ([11, 12], 1, 51), ([21], 1, 52), ([], 0, 53), ([31, 32], 2, 54)
    ]  # fmt: skip
    stats = log.stats()
    assert (stats["rounds"], stats["candidates"], stats["accepted"], stats["emitted"]) == (4, 5, 4, 8)
    assert stats["draft_passes"] == 2 + 1 + 1 + 3 + 1
    assert stats["lengths"] == {0: 1, 1: 1, 2: 2}


def test_a_prompt_read_anew_is_no_round():
    log = DeferredRounds(trace_rounds=10)
    _step(log, "a", [1, 0, 50, 11, 12, -1], prefill=True)
    _step(log, "a", [0, 0, 50, -1, -1, -1], prefill=True)  # preempted: a first chunk
    _step(log, "a", [1, 0, 51, 13, -1, -1], prefill=True)
    assert log.rounds() == []
    _step(log, "a", [2, 0, 52, -1, -1, -1])
    assert len(log.rounds()) == 1


def test_nothing_waits_until_it_is_asked_for():
    log = DeferredRounds()
    events = [_Event(), _Event()]
    steps = ([1, 0, 50, 11, -1, -1], [2, 0, 51, 21, -1, -1])
    for event, numbers in zip(events, steps, strict=True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(log.in_flight, "settle", lambda: None)  # on a CPU the numbers are there at once
            _step(log, "a", numbers)
        assert log._last is not None
        log._last[1]._copied = event
    log.in_flight.settle()
    assert (log.in_flight.num(log._account), events[0].query()) == (2, False)
    events[0].arrived = True
    log.in_flight.settle()
    assert (log.in_flight.num(log._account), events[1].query()) == (1, False)
    assert log.candidates(["a", "b"]) == [[21], []]
    assert events[1].query()
    assert log.stats()["rounds"] == 1


def test_finished_requests_are_forgotten():
    log = DeferredRounds()
    _step(log, "a", [1, 0, 50, 11, -1, -1])
    log.note(["b"], [False], ["a"], torch.tensor([[1, 0, -1, -1, 0, 60, -1]]), 1)
    assert list(log._candidates) == ["b"]


def test_a_table_is_made_anew_only_if_something_changed():
    requests = BatchRequests()
    requests.add("a", 10, _params(max_tokens=5))
    table = requests.table(["a", "b"], 8, 100)
    assert requests.table(["a", "b"], 8, 100) is table
    for other in ((["b", "a"], 8, 100), (["a", "b"], 7, 100), (["a", "b"], 8, 99)):
        assert requests.table(*other) is not table
    requests.add("b", 10, _params(max_tokens=6))
    assert requests.table(["a", "b"], 8, 100)[:, 1].tolist() == [15, 16]
    requests.update(SimpleNamespace(finished_req_ids=["a"], scheduled_new_reqs=[]))
    assert requests.table(["a", "b"], 8, 100)[0, 1] == 100
