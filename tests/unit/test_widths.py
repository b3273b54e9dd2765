# SPDX-License-Identifier: Apache-2.0
"""Padding to a cheaper width."""

from __future__ import annotations

import time

from vllm_specdecpp.engine.shared.widths import RowWidths, measure


def test_pads_up_to_a_cheaper_width_and_never_down():
    widths = RowWidths([26.0, 28.0, 23.0, 22.9, 24.0])
    assert [widths.cheapest(n) for n in range(1, 6)] == [4, 4, 3, 4, 5]


def test_a_gain_within_the_noise_does_not_pad():
    assert RowWidths([10.0, 9.9, 9.8]).cheapest(1) == 1


def test_beyond_the_table_and_without_one_nothing_is_padded():
    assert RowWidths([3.0, 1.0]).cheapest(3) == 3
    assert RowWidths().cheapest(1) == 1


def test_measure_finds_the_slow_width():
    calls = []

    def run(num_rows: int) -> None:
        calls.append(num_rows)
        time.sleep(0.02 if num_rows == 1 else 0.001)

    seconds = measure(run, max_rows=3, repeats=3)
    assert calls == [1, 2, 3] * 4
    assert len(seconds) == 3
    assert RowWidths(seconds).cheapest(1) in (2, 3)
