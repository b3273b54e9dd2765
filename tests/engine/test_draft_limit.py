# SPDX-License-Identifier: Apache-2.0
"""A draft model with fewer positions than the target: each request drafts as far as they go, and then is served on.

The draft has the target's weights, so every candidate is accepted unless its draft KV is wrong.
"""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace
from typing import Any

import pytest

from tests import engine_harness as harness
from tests.reference_loop import answer
from vllm_specdecpp.engine.shared import draft_limit

POSITIONS = 48
MAX_LENGTH = 6
BLOCK_SIZE = 32
PROMPT_LENGTHS = (5, 30, 41, 46, 47, 48, 60)


@pytest.fixture(scope="module")
def short(tiny, tmp_path_factory):
    """The target's checkpoint, but for the number of its positions."""
    folder = tmp_path_factory.mktemp("drafts") / "short"
    shutil.copytree(tiny.target, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": POSITIONS}))
    return str(folder)


def _prompts() -> list[list[int]]:
    (longest,) = harness.prompts(1, seed=21, shortest=60, longest=60)
    return [harness.prompts(1, seed=n, shortest=n, longest=n)[0] for n in PROMPT_LENGTHS[:-1]] + [longest]


def _read_positions(llm: Any) -> list[int]:
    """The largest position of each pass of the draft model, in a list that fills."""
    runner = harness.runner(llm)
    model = (runner.speculator if runner.vllm_config.use_v2_model_runner else runner.drafter).model
    forward, seen = model.forward, []

    def recorded(*args: Any, **kwargs: Any) -> Any:
        seen.append(int(kwargs["positions"].max()))
        return forward(*args, **kwargs)

    model.forward = recorded
    return seen


def _check_rounds(outputs: list[Any], rounds: list[dict[str, Any]], max_tokens: int) -> int:
    """Each round is as long as positions and tokens allow, and accepted whole; returns how many draft nothing."""
    empty = 0
    for output, mine in zip(outputs, harness.rounds_of(outputs, rounds), strict=True):
        position, left = len(output.prompt_token_ids), max_tokens - 1
        for candidates, accepted, _ in mine:
            room = max(min(MAX_LENGTH, POSITIONS - position, left - 1), 0)
            assert (len(candidates), accepted) == (room, room), f"position {position}"
            position, left, empty = position + accepted + 1, left - accepted - 1, empty + (room == 0)
        assert left == 0
    return empty


@pytest.mark.asks(12)
def test_requests_draft_to_the_drafts_last_position(tiny, reference, short, monkeypatch):
    """Prompts that are read in chunks, some of them longer than the draft's context; then one that shares a prefix with
    such a prompt, whose blocks the draft model did not read."""
    prompts, max_tokens = _prompts(), 24
    sharing = [[*prompts[-1][:BLOCK_SIZE], 7, 8]]
    options: dict[str, Any] = {"max_num_batched_tokens": 40, "enable_prefix_caching": True, "block_size": BLOCK_SIZE}
    warned: list[int] = []
    logger = SimpleNamespace(warning_once=lambda message, limit: warned.append(limit))
    monkeypatch.setattr(draft_limit, "logger", logger)

    expected = [[answer(reference("target"), p, max_tokens) for p in asked] for asked in (prompts, sharing)]
    config = {
        "method": "specdecpp", "model": short, "rule": "fixed", "num_speculative_tokens": MAX_LENGTH,
        "trace_rounds": 100_000,
    }  # fmt: skip
    with harness.engine(tiny.target, config, **options) as llm:
        positions = _read_positions(llm)
        with harness.verified_rounds(llm) as rounds:
            outputs = harness.generate(llm, prompts[-1:], ignore_eos=True, max_tokens=2)
        assert not any(r["candidates"] for r in rounds) and positions == [] and set(warned) == {POSITIONS}
        assert llm.reset_prefix_cache() and len(harness.take_rounds(llm)) == 1
        for prompt, wanted in zip((prompts, sharing), expected, strict=True):
            with harness.verified_rounds(llm) as rounds:
                outputs = harness.generate(llm, prompt, ignore_eos=True, max_tokens=max_tokens)
            assert harness.token_ids(outputs) == wanted
            assert (_check_rounds(outputs, rounds, max_tokens) > 20) is (prompt is prompts)
            assert harness.rounds_of(outputs, harness.take_rounds(llm)) == harness.rounds_of(outputs, rounds)
            assert sum(len(r["candidates"]) for r in rounds) > 10
        assert outputs[0].num_cached_tokens == BLOCK_SIZE
    assert max(positions) == POSITIONS - 1
