# SPDX-License-Identifier: Apache-2.0
"""Timing single passes at start-up, and the file that the costs are kept in."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.unit.test_admission import best, costs, plan, standing
from vllm_specdecpp.costs import timing
from vllm_specdecpp.costs.widths import cheapest_rows
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

    times = timing.time_widths(run, timing.coarse_to_fine(3), _same, clock=clock, seconds=100)
    assert times == pytest.approx({n: 0.01 * n + 0.006 for n in (1, 2, 3)}) and list(times) == [1, 2, 3]
    assert runs == [1, 1, 3, 3, 2, 2, *[1, 3, 2] * (timing.REPEATS - 1)]  # a slow moment hits no width alone


def test_time_that_runs_out_ends_after_four_widths_at_the_earliest():
    clock = _Clock()

    def run(width: int) -> None:
        clock.now += 10.0

    times = timing.time_widths(run, timing.coarse_to_fine(100), _same, 3.0, clock)
    assert list(times) == [1, 4, 16, 64] and clock.now == 50.0  # and none of them again, once no kernels are built


@pytest.mark.parametrize(("builds", "wide"), [(0.0, 1), (2.0, 2)])
def test_a_long_run_is_not_repeated_where_no_kernel_is_built(builds: float, wide: int) -> None:
    clock, runs = _Clock(), Counter[int]()

    def run(width: int) -> None:
        runs[width] += 1
        clock.now += 0.02 * width + (builds if runs[width] == 1 else 0.0)

    times = timing.time_widths(run, timing.coarse_to_fine(64), _same, clock=clock, seconds=100)
    assert times == pytest.approx({n: 0.02 * n for n in times})
    assert {runs[n] for n in times if n > 25} == {wide} and runs[1] == 1 + timing.REPEATS


def test_a_width_that_would_end_too_late_is_left_out_and_narrower_ones_are_not() -> None:
    clock = _Clock()

    def run(width: int) -> None:
        clock.now += 0.02 * width

    times = timing.time_widths(run, timing.coarse_to_fine(256), _same, 7.0, clock)
    assert 256 not in times and 128 not in times and {1, 2, 4, 8, 16, 64} <= times.keys() and clock.now <= 7.0


def test_no_width_beyond_the_wanted_one_or_the_bound():
    assert max(timing.coarse_to_fine(37)) == 37 and max(timing.coarse_to_fine(10_000)) == timing.MAX_WIDTH
    assert timing.coarse_to_fine(1) == [1]


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

    widths = timing.coarse_to_fine(64)
    first = timing.time_widths(lambda w: run(slow, 1.0, runs[0], w), widths, lead, 9.0, slow)
    answers = iter(told)
    second = timing.time_widths(lambda w: run(fast, 1e-6, runs[1], w), widths, lambda _: next(answers), 9.0, fast)
    assert first == second and runs[0] == runs[1]


def test_curves_add_the_lm_head_and_double_the_first_pass():
    draft = {1: 10.0, 2: 12.0, 3: 13.0, 4: 15.0, 8: 23.0}
    logits = {1: 1.0, 2: 1.5, 3: 2.0}
    found = timing.curves(draft, logits, {1: 50.0})
    assert found == {
        "first": {1: 13.0, 2: 16.5, 3: 21.0}, "step": {1: 11.0, 2: 13.5, 3: 15.0}, "verify": {1: 50.0}
    }  # fmt: skip
    few = timing.curves({1: 10.0, 4: 16.0, 16: 40.0}, logits, {1: 50.0})  # a start that had no time for width 3
    assert few["step"] == {1: 11.0, 2: 13.5, 3: 16.0} and few["first"] == {1: 13.0, 2: 17.5, 3: 22.0}


class _Passes:
    target_to_draft: float | None = None

    def __init__(self, clock: _Clock, token_seconds: float = 0.001, least: int = 1) -> None:
        self.clock, self.token_seconds, self.least = clock, token_seconds, least
        self.rows: dict[str, list[int]] = {}

    def draft(self, num_rows: int) -> None:
        slow = 0.030 if num_rows < self.least else 0.0
        self.clock.now += 0.010 + self.token_seconds * num_rows + slow

    def draft_logits(self, num_rows: int) -> None:
        self.clock.now += 0.002

    def target(self, num_rows: int) -> None:
        assert self.target_to_draft is None
        self.clock.now += 0.100

    def pad(self, times: dict[str, dict[int, float]]) -> dict[str, list[int]]:
        assert list(times) == ["draft", "logits"] + ["target"] * (self.target_to_draft is None)
        self.rows = {name: cheapest_rows(seconds) for name, seconds in times.items()} if self.least > 1 else {}
        return self.rows


def _measure(passes: _Passes, waited: float = 1e9, most: int = 100) -> Any:
    scheduler = SimpleNamespace(max_num_seqs=2, max_num_batched_tokens=most)
    return timing.measure(passes, scheduler, 2, _same, waited, passes.clock)


@pytest.mark.parametrize("ratio", [None, 3.0])
def test_measure(ratio):
    passes = _Passes(_Clock())
    passes.target_to_draft = ratio
    points = _measure(passes)
    assert points["step"] == pytest.approx({1: 0.013, 2: 0.014})
    assert points["first"] == pytest.approx({1: 0.014, 2: 0.016})
    widths = points["read"] if ratio else range(1, 7)
    assert points["verify"] == pytest.approx({n: ratio * (0.010 + 0.001 * n) if ratio else 0.1 for n in widths})


def test_narrow_passes_are_timed_once_and_cost_what_the_width_that_they_run_at_costs():
    passes = _Passes(_Clock(), least=4)
    points = _measure(passes)
    assert passes.rows["draft"] == [4, 4, 4, 4, 5, 6, 7, 8] and passes.rows["target"] == list(range(1, 9))
    assert points["step"] == pytest.approx({1: 0.016, 2: 0.016})
    assert points["read"][3] == pytest.approx(0.014) and points["read"][5] == pytest.approx(0.015)


@pytest.mark.parametrize(("waited", "least", "most"), [(5.0, 0.5, 1.2), (50.0, 2.0, 3.0), (1e6, 3.0, 8.0)])
def test_timing_takes_its_share_of_the_start(waited, least, most):
    """Passes as on a CPU; four widths of a curve take 1.2 s."""
    passes = _Passes(_Clock())
    _measure(passes, waited, 2048)
    assert least < passes.clock.now <= most


@pytest.mark.parametrize(
    ("token_seconds", "most", "widest"),
    [
        (1e-3, 100, 100),
        (2e-4, 2048, 2048),
        (2e-3, 2048, 256),  # the widest one would take twice 4 s
        (1e-3, 2, 2),
    ],
)
def test_reading_is_timed_as_far_as_that_is_cheap(token_seconds, most, widest):
    read = _measure(_Passes(_Clock(), token_seconds), most=most)["read"]
    assert read == pytest.approx({n: 0.010 + token_seconds * n for n in read}) and max(read) == widest


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
    paths = {cost_file.cost_file(_config(**change), device).path for change in changes}
    assert len(paths) == len(changes)
    assert {path.parent for path in paths} == {tmp_path / "specdecpp"}
    assert cost_file.cost_file(_config(), device).path in paths
    assert cost_file.cost_file(_config(), device, lora="2").path not in paths
    assert cost_file.cost_file(_config(), device).setting["device"]


def test_draft_passes_that_were_timed_in_a_slow_moment_are_tried_until_they_were_seen() -> None:
    model = costs(first=0.11, step=0.11)  # 1.5 times as dear as they are; even easy text would not pay
    assert best(model, 1, [0.95], [20], [0.0])[0] < 10.0
    assert plan([standing()], model, looks=4.0, purse=5.0)[1].trial
    for _ in range(20):
        model.observe_draft([1, 1, 1], 0.33)
    assert not plan([standing()], model, looks=4.0, purse=5.0)[1].drafts.any()
