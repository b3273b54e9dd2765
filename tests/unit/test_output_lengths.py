# SPDX-License-Identifier: Apache-2.0
"""How many tokens are still expected of a request, and how many of them without a free run."""

from __future__ import annotations

import pytest

from vllm_specdecpp.decision.cost_aware.output_lengths import OutputLengths


def serve(lengths: OutputLengths, name: str, tokens: int, beside: str | None = None) -> None:
    for emitted in range(1, tokens + 1, 2):
        lengths.update({name: emitted} | ({beside: 10} if beside else {}))


def test_the_usual_length_less_what_was_emitted_but_as_much_as_was() -> None:
    lengths = OutputLengths()
    for i in range(300):
        serve(lengths, f"{i}", 41)
    lengths.update({"c": 1})
    assert lengths.remaining("c", 100) == pytest.approx(40, abs=1) and lengths.remaining("c", 12) == 12
    lengths.update({"c": 35})
    assert lengths.remaining("c", 100) == 35


def test_what_runs_will_not_bring_is_what_they_have_not_brought() -> None:
    lengths = OutputLengths()
    lengths.update({"a": 30, "b": 30})
    lengths.brought(["a", "b"], [25, -3])
    assert [lengths.remaining(name, 1000, runs=True) for name in "ab"] == [5, 30]
    assert lengths.remaining("a", 1000) == 70 and lengths.remaining("a", 3, runs=True) == 3
    lengths.update({"b": 31})
    lengths.update({"a": 30, "b": 31})
    assert lengths.remaining("a", 1000, runs=True) == 30, "of a request that had left"


def test_requests_that_go_on_are_not_counted() -> None:
    lengths = OutputLengths()
    for i in range(300):
        serve(lengths, str(i), 19, beside="long")
    assert lengths._emitted.keys() == {"299", "long"} and lengths.remaining("long", 10**6) == 10


def test_requests_that_leave_together_count_in_the_batchs_order() -> None:
    """A set of names has another order in each process: ranks would come to differ by a rounding, then by a draft."""
    together, one_by_one = OutputLengths(), OutputLengths()
    batch = {f"cmpl-{i}": 3 * i**2 for i in range(100)}
    together.update(batch)
    together.update({})
    one_by_one.update(batch)
    for i in range(100):
        one_by_one.update(dict(list(batch.items())[i + 1 :]))
    assert together.state() == one_by_one.state()
