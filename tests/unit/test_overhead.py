# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import overhead


@pytest.mark.parametrize("batch", [1, 16])
def test_deciding_takes_less_than_a_fiftieth_of_a_round(batch):
    spent, num_passes = overhead.measure(batch, 5, 60)
    assert num_passes.mean() > 3  # there was something to decide
    # Of the 250 ms that such a round takes on two cores; the lower decile, since other processes slow it down.
    assert np.quantile(sum(spent.values()), 0.1) < 0.02 * 0.25
    assert all((part > 0).any() for part in spent.values())


def test_prints_each_part_and_json(capsys):
    assert overhead.main(["--batches", "2", "--rounds", "5", "--warm"]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = json.loads(lines[-1])["rows"][0]
    assert row["batch"] == 2 and row["sum"] == pytest.approx(sum(row[p] for p in overhead.PARTS), rel=0.5)
    assert overhead.main(["--rounds", "0"]) == 2
