# SPDX-License-Identifier: Apache-2.0
"""Padding of draft passes and verifications: same rounds, same tokens, wider passes."""

from __future__ import annotations

from typing import Any

import pytest

from tests import engine_harness as harness
from vllm_specdecpp.costs.widths import PASSES

WIDER = [4, 4, 4, 4, 8, 8, 8, 8]


@pytest.fixture(scope="module")
def llm(tiny):
    config = {
        "method": "specdecpp", "model": tiny.draft_good, "num_speculative_tokens": 6, "trace_rounds": 100_000,
        "rule": "confidence",  # whose rounds do not depend on the clock
    }  # fmt: skip
    with harness.engine(tiny.target, config) as engine:
        yield engine


def widths_seen(runner: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seen: list[int] = []
    forward = runner.model.forward

    def watch(*args: Any, **kwargs: Any) -> Any:
        seen.append(len(kwargs["input_ids"]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(runner.model, "forward", watch)
    return seen


@pytest.mark.parametrize("num_requests", [1, 3])
def test_padding_changes_the_width_and_nothing_else(llm, monkeypatch, num_requests):
    runner = harness.runner(llm)
    requests = harness.prompts(num_requests, seed=5)
    results, widths = [], []
    for table in ({}, dict.fromkeys(PASSES, WIDER)):
        runner.drafter.pad(table)
        seen = widths_seen(runner, monkeypatch)
        harness.take_rounds(llm)
        outputs = harness.generate(llm, requests, ignore_eos=True)
        results.append((harness.token_ids(outputs), harness.rounds_of(outputs, harness.take_rounds(llm))))
        widths.append([n for n in seen if n <= 8])
        monkeypatch.undo()
    runner.drafter.pad({})
    assert results[0] == results[1]
    assert set(widths[0]) - {4, 8}, "the plain run has no width to pad: the test shows nothing"
    assert widths[1] and set(widths[1]) <= {4, 8}


def test_widths_that_do_not_fit_are_left_out(llm, monkeypatch):
    drafter = harness.runner(llm).drafter
    monkeypatch.setattr(drafter.vllm_config.scheduler_config, "max_num_batched_tokens", 6)
    drafter.pad({"draft": WIDER, "logits": [*range(1, 9)]})
    assert drafter.rows == {"draft": [4, 4, 4, 4, 5, 6, 7, 8]}
    drafter.pad({})


@pytest.mark.parametrize("name", ["supports_mm_inputs", "uses_mrope"])
def test_a_target_that_takes_more_than_token_ids_is_left_alone(llm, monkeypatch, name):
    """What was kept may be of another engine."""
    runner = harness.runner(llm)
    monkeypatch.setattr(runner, name, True)
    runner.drafter.pad(dict.fromkeys(PASSES, WIDER))
    assert list(runner.drafter.rows) == ["draft", "logits"]
    runner.drafter.pad({})
