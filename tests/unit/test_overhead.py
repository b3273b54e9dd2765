# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import sys
import time

import numpy as np
import pytest
import torch

from benchmarks.simulate import overhead


def yardstick():
    """Processor seconds of a small torch operation: on a busy machine it takes longer, as all that is measured does."""
    values, spent = torch.ones(16, 6), []
    for _ in range(20):
        start = time.thread_time()
        for _ in range(200):
            values + values
        spent.append((time.thread_time() - start) / 200)
    return np.median(spent)


@pytest.mark.parametrize(("batch", "most"), [(1, 1500), (16, 2100)])
def test_deciding_takes_about_a_hundredth_of_a_round(batch, most):
    """By the calls that a round makes, since seconds are the machine's: 3 ms of the 250 ms of such a round."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        spent, num_passes = overhead.measure(batch, 5, 60)
    finally:
        sys.setprofile(None)
    assert num_passes.mean() > 3  # there was something to decide
    assert calls / 110 < most  # 50 rounds are not timed
    assert all((part > 0).any() for part in spent.values())


@pytest.mark.parametrize(("mode", "parts"), [([], overhead.PARTS), (["--v2"], overhead.PARTS_V2)])
def test_prints_each_part_and_json(capsys, mode, parts):
    assert overhead.main(["--batches", "2", "--rounds", "5", "--warm", *mode]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = json.loads(lines[-1])["rows"][0]
    assert row["batch"] == 2 and row["sum"] == pytest.approx(sum(row[p] for p in parts), rel=0.5)
    assert row["passes"] > 1  # there was something to decide
    assert overhead.main(["--rounds", "0"]) == 2


def test_prints_the_search_for_runs_and_its_memory(capsys):
    """A hundredth of a round is 2.5 ms; nothing is held that grows with the tokens."""
    assert overhead.main(["--runs", "--batches", "2", "--rounds", "5", "--tokens", "32768"]) == 0
    *rows, sizes = json.loads(capsys.readouterr().out.splitlines()[-1])["search"]
    assert {row["text"] for row in rows} == set(overhead.TEXTS)
    assert max(row["median"] for row in rows) < 250 * max(1.0, yardstick() * 1e6)
    assert sizes["bytes"]["held"] < 4096 and 4 * 32768 < sizes["bytes"]["peak"] < 40 * 32768
    assert sizes["bytes"]["device"] < 2 * 12 * (overhead.MAX_LENGTH + 4)
    assert overhead.main(["--runs", "--others", "--batches", "2", "--rounds", "2", "--tokens", "4096"]) == 0
    both = json.loads(capsys.readouterr().out.splitlines()[-1])["search"]
    assert {row["text"] for row in both} == set(overhead.TEXTS) and min(row["median"] for row in both) > 0
    assert overhead.main(["--runs", "--tokens", "7"]) == 2
