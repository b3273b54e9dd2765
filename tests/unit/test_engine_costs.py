# SPDX-License-Identifier: Apache-2.0
"""Timing single passes at start-up, and the file that the costs are kept in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_specdecpp.costs import timing
from vllm_specdecpp.engine.shared import cost_file


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def test_the_least_time_of_each_width_counts_and_the_first_run_does_not():
    clock, runs = _Clock(), []

    def run(width: int) -> None:
        runs.append(width)
        first = runs.count(width) == 1
        clock.now += 5.0 if first else 0.01 * width + 0.003 * runs.count(width)

    times = timing.time_widths(run, 3, _same, clock=clock, seconds=100)
    assert times == pytest.approx({n: 0.01 * n + 0.006 for n in (1, 2, 3)}) and list(times) == [1, 2, 3]
    assert runs == [w for w in (1, 3, 2) for _ in range(1 + timing.REPEATS)]


def test_time_that_runs_out_ends_after_four_widths_at_the_earliest():
    clock = _Clock()

    def run(width: int) -> None:
        clock.now += 10.0

    assert list(timing.time_widths(run, 100, _same, clock=clock)) == [1, 4, 16, 100]  # the range before its inside


def test_no_width_beyond_the_wanted_one_or_the_bound():
    clock = _Clock()

    def run(width: int) -> None:
        clock.now += 1e-5

    assert max(timing.time_widths(run, 37, _same, clock=clock)) == 37
    assert max(timing.time_widths(run, 10_000, _same, clock=clock)) == timing.MAX_WIDTH
    assert list(timing.time_widths(run, 1, _same, clock=clock)) == [1]


def test_ranks_stop_at_the_same_width_with_the_same_times():
    """Rank 1's clock says it has all the time in the world; rank 0's does not."""
    told: list[torch.Tensor] = []

    def lead(tensor: torch.Tensor) -> torch.Tensor:
        told.append(tensor.clone())
        return tensor

    slow, fast = _Clock(), _Clock()
    runs: list[list[int]] = [[], []]

    def run(clock: _Clock, seconds: float, log: list[int], width: int) -> None:
        clock.now += seconds
        log.append(width)

    first = timing.time_widths(lambda w: run(slow, 1.0, runs[0], w), 64, lead, clock=slow)
    answers = iter(told)
    second = timing.time_widths(lambda w: run(fast, 1e-6, runs[1], w), 64, lambda _: next(answers), clock=fast)
    assert first == second and runs[0] == runs[1]


def test_curves_add_the_lm_head_and_double_the_first_pass():
    draft = {1: 10.0, 2: 12.0, 3: 13.0, 4: 15.0, 8: 23.0}
    logits = {1: 1.0, 2: 1.5, 3: 2.0}
    found = timing.curves(draft, logits, {1: 50.0})
    assert found == {
        "first": {1: 13.0, 2: 16.5, 3: 21.0}, "step": {1: 11.0, 2: 13.5, 3: 15.0}, "verify": {1: 50.0}
    }  # fmt: skip


class _Passes:
    target_to_draft: float | None = None

    def __init__(self, clock: _Clock) -> None:
        self.clock = clock

    def draft(self, num_rows: int) -> None:
        self.clock.now += 0.010 + 0.001 * num_rows

    def draft_logits(self, num_rows: int) -> None:
        self.clock.now += 0.002

    def target(self, num_rows: int) -> None:
        assert self.target_to_draft is None
        self.clock.now += 0.100


@pytest.mark.parametrize("ratio", [None, 3.0])
def test_measure(monkeypatch, ratio):
    clock = _Clock()
    monkeypatch.setattr(timing.time_widths, "__defaults__", (timing.SECONDS_PER_CURVE, clock))
    passes = _Passes(clock)
    passes.target_to_draft = ratio
    scheduler = SimpleNamespace(max_num_seqs=2, max_num_batched_tokens=100)
    points = timing.measure(passes, scheduler, 2, _same)
    assert points["step"] == pytest.approx({1: 0.013, 2: 0.014})
    assert points["first"] == pytest.approx({1: 0.014, 2: 0.016})
    widths = range(1, 5) if ratio else range(1, 7)  # the draft's passes go up to two tokens a request
    assert points["verify"] == pytest.approx({n: ratio * (0.010 + 0.001 * n) if ratio else 0.1 for n in widths})


def _config(**changes: Any) -> Any:
    options = {"target": "t", "draft": "d", "dtype": torch.bfloat16, "eager": False, "tp": 1, **changes}
    draft = SimpleNamespace(model=options["draft"], quantization=None)
    return SimpleNamespace(
        model_config=SimpleNamespace(
            model=options["target"], dtype=options["dtype"], quantization=None, enforce_eager=options["eager"]
        ),
        speculative_config=SimpleNamespace(draft_model_config=draft),
        parallel_config=SimpleNamespace(tensor_parallel_size=options["tp"]),
    )


def test_another_setting_has_another_file(monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    device = torch.device("cpu")
    changes: list[dict[str, Any]] = [
        {}, {"target": "t2"}, {"draft": "d2"}, {"dtype": torch.float32}, {"eager": True}, {"tp": 2},
    ]  # fmt: skip
    paths = {cost_file.cost_cache(_config(**change), device).path for change in changes}
    assert len(paths) == len(changes)
    assert {path.parent for path in paths} == {tmp_path / "specdecpp"}
    assert cost_file.cost_cache(_config(), device).path in paths
    assert cost_file.cost_cache(_config(), device).key["device"]
