# SPDX-License-Identifier: Apache-2.0
"""On Model Runner V1 a step's tokens are sent before the next candidates are drafted."""

from __future__ import annotations

import types
from typing import Any

import pytest
from vllm import envs

from tests import engine_harness as harness
from vllm_specdecpp.engine.v1 import late_drafts


class Runner:
    """As ``GPUModelRunner.sample_tokens`` and ``take_draft_token_ids`` go about drafts."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self._draft_token_ids: Any = None

    def propose_draft_token_ids(self, scheduler_output: Any, *args: Any) -> list[list[int]]:
        self.events.append(f"draft {scheduler_output}")
        return [[7]]

    def _copy_draft_token_ids_to_cpu(self, scheduler_output: Any) -> None:
        self.events.append("copy")

    def sample_tokens(self, step: str) -> None:
        self._draft_token_ids = self.propose_draft_token_ids(step, "sampled")
        self._copy_draft_token_ids_to_cpu(step)
        self.events.append(f"return {step}")


def test_drafts_are_made_once_the_step_has_returned():
    runner = Runner()
    late = late_drafts.LateDrafts(runner)
    runner.sample_tokens("one")
    assert runner.events == ["copy", "return one"] and runner._draft_token_ids == []
    late.run()
    assert runner.events[2:] == ["draft one", "copy"] and runner._draft_token_ids == [[7]]
    late.run()  # nothing was put off since
    assert len(runner.events) == 4


@pytest.mark.parametrize(
    ("is_async", "connector", "executor", "waits"),
    [
        (False, None, "mp", True), (True, None, "mp", False), (False, "some", "mp", False), (False, None, "ray", True),
        (False, None, "old ray", False),
    ],
)  # fmt: skip
def test_where_the_engine_asks_too_late_or_kv_is_saved_nothing_is_put_off(
    monkeypatch, is_async, connector, executor, waits
):
    if executor == "old ray" and not hasattr(envs, "VLLM_USE_RAY_V2_EXECUTOR_BACKEND"):
        pytest.skip("vLLM 0.33 has no other")
    monkeypatch.setenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", str(int(executor != "old ray")))
    config = types.SimpleNamespace(
        scheduler_config=types.SimpleNamespace(async_scheduling=is_async), kv_transfer_config=connector,
        parallel_config=types.SimpleNamespace(distributed_executor_backend=executor.split()[-1]),
    )  # fmt: skip
    assert late_drafts.can_wait(config) is waits


def test_an_engine_sends_what_a_step_emitted_before_it_drafts(tiny, monkeypatch):
    llm = harness.kept(tiny.target, {"method": "specdecpp", "model": tiny.draft_good, "rule": "fixed"})
    core = llm.llm_engine.engine_core.engine_core
    events: list[str] = []

    def note(owner: Any, name: str, event: str) -> None:
        original = getattr(owner, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            events.append(event)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)

    note(core.scheduler, "update_from_output", "sent")
    note(core.model_executor.driver_worker.worker.model_runner.drafter, "propose", "drafted")
    harness.generate(llm, harness.prompts(2), max_tokens=8, ignore_eos=True)
    assert len(events) > 4 and events == ["sent", "drafted"] * (len(events) // 2)
