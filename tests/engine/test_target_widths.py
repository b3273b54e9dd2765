# SPDX-License-Identifier: Apache-2.0
"""Padding the target's verification: same rounds, same tokens, wider passes; and what it is not used for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests import engine_harness as harness

WIDER = [3.0, 3.0, 3.0, 1.0, 3.0, 3.0, 3.0, 1.0]
"""Times with which 1 to 3 rows go at 4, and 5 to 7 at 8."""


@pytest.fixture(scope="module")
def llm(tiny):
    config = {
        "method": "specdecpp", "model": tiny.draft_good, "num_speculative_tokens": 6, "trace_rounds": 100_000,
        "rule": "confidence",  # whose rounds do not depend on the clock
    }  # fmt: skip
    with harness.engine(tiny.target, config) as engine:
        yield engine


def runner_of(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def test_the_worker_measures_and_pads_at_start_up(llm):
    runner = runner_of(llm)
    assert "_determine_batch_execution_and_padding" in runner.__dict__


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
    from vllm_specdecpp.engine.shared.widths import RowWidths
    from vllm_specdecpp.engine.v1.target_widths import pad_to, unpad

    runner = runner_of(llm)
    requests = harness.prompts(num_requests, seed=5)
    results, widths = [], []
    for table in ([], WIDER):
        pad_to(runner, RowWidths(table))
        seen = widths_seen(runner, monkeypatch)
        harness.take_rounds(llm)
        outputs = harness.generate(llm, requests, ignore_eos=True)
        results.append((harness.token_ids(outputs), harness.rounds_of(outputs, harness.take_rounds(llm))))
        widths.append([n for n in seen if n <= 8])
        monkeypatch.undo()
    unpad(runner)
    assert results[0] == results[1]
    assert set(widths[0]) - {4, 8}, "the plain run has no width to pad: the test shows nothing"
    assert widths[1] and set(widths[1]) <= {4, 8}


def test_measuring_gives_a_time_for_each_width(llm):
    from vllm_specdecpp.engine.v1.target_widths import measure_target

    seconds = measure_target(runner_of(llm))
    assert len(seconds) == 8 and all(0 < s < 10 for s in seconds)


@pytest.mark.parametrize(("lora", "multimodal"), [(object(), False), (None, True)])
def test_models_with_other_inputs_are_left_alone(lora, multimodal):
    from vllm_specdecpp.engine.v1.target_widths import can_pad

    runner = SimpleNamespace(vllm_config=SimpleNamespace(lora_config=lora), supports_mm_inputs=multimodal)
    assert not can_pad(runner)
    plain = SimpleNamespace(vllm_config=SimpleNamespace(lora_config=None), supports_mm_inputs=False)
    assert can_pad(plain)
