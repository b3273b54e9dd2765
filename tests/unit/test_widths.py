# SPDX-License-Identifier: Apache-2.0
"""Padding to a cheaper width."""

from __future__ import annotations

import pytest

from vllm_specdecpp.costs.widths import cheapest_rows, padded, padded_times


@pytest.mark.parametrize(
    ("seconds", "rows"),
    [
        ({1: 26.0, 2: 28.0, 3: 23.0, 4: 22.9, 5: 24.0}, [4, 4, 3, 4, 5, 6, 7, 8]),  # never down
        ({1: 10.0, 2: 9.9, 3: 9.8}, [1, 2, 3, 4, 5, 6, 7, 8]),  # a gain within the noise
        ({1: 10.0, 4: 6.0, 16: 5.0}, [4, 4, 4, 4, 5, 6, 7, 8]),  # 2 and 3 were not timed; 16 is too wide
        ({1: 5.0, 4: 9.0, 5: 7.0}, [1, 2, 5, 5, 5, 6, 7, 8]),  # a narrower one that is cheaper still is of no use
        ({1: 10.0, 8: 6.0}, [8, 8, 8, 8, 8, 8, 8, 8]),
    ],
)
def test_a_few_rows_run_at_the_cheapest_width_from_theirs_on(seconds, rows):
    assert cheapest_rows(seconds) == rows
    assert [padded(rows, n) for n in (1, 8, 9)] == [rows[0], rows[7], 9]
    assert padded_times({**seconds, 32: 99.0}, rows) == {n: seconds[padded(rows, n)] for n in seconds} | {32: 99.0}


def test_without_a_table_nothing_is_padded():
    assert padded((), 1) == 1 and padded_times({1: 2.0, 2: 1.0}, ()) == {1: 2.0, 2: 1.0}
