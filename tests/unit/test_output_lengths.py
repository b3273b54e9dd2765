# SPDX-License-Identifier: Apache-2.0
"""How long requests are expected to go on."""

from __future__ import annotations

from vllm_specdecpp.decision.cost_aware.output_lengths import OutputLengths


def _serve(lengths: OutputLengths, name: str, prompt: int, tokens: int, beside: str | None = None) -> None:
    """One request, its output two tokens a round."""
    for emitted in range(1, tokens + 1, 2):
        lengths.update({name: prompt + emitted - 1} | ({beside: 10} if beside else {}))


def test_what_the_request_may_emit_before_anything_is_known() -> None:
    lengths = OutputLengths()
    lengths.update({"a": 7})
    assert lengths.remaining("a", 100) == 100


def test_the_mean_of_those_that_ended_less_what_was_emitted() -> None:
    lengths = OutputLengths()
    _serve(lengths, "a", 50, 21)
    _serve(lengths, "b", 900, 41)
    lengths.update({"c": 30})  # a and b have ended, with 21 and 41 tokens
    assert lengths.remaining("c", 100) == 31 - 1
    assert lengths.remaining("c", 12) == 12
    lengths.update({"c": 30 + 24})
    assert lengths.remaining("c", 100) == 31 / 4  # it may be a long one
    lengths.update({"c": 30 + 99})
    assert lengths.remaining("c", 100) == 31 / 4


def test_requests_that_go_on_are_not_counted_and_ended_ones_are_forgotten() -> None:
    lengths = OutputLengths()
    for i in range(500):
        _serve(lengths, str(i), 5, 9 if i < 100 else 19, beside="long")
    assert lengths._starts.keys() == {"long", "499"}
    assert abs(lengths.remaining("long", 10**6) - 18) < 0.1  # the last 64 or so tell
