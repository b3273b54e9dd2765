# SPDX-License-Identifier: Apache-2.0
"""``collect --source paper`` without given responses: vLLM generates the target's, then the models label them."""

from __future__ import annotations

import gc
import json

import pytest

from vllm_specdecpp.training.collect.command import run
from vllm_specdecpp.training.collect.options import CollectOptions

SENTENCES = ["Wrap the text.", "A line of words.", "x", "word " * 200]
MAX_TOKENS = 6


@pytest.fixture
def engine_ends():
    """Only one engine can live in a process; the command's own process would end with it."""
    yield
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
    gc.collect()


def test_the_targets_own_answers_are_labelled(tiny, reference, tmp_path, engine_ends):
    (tmp_path / "prompts.txt").write_text("\n".join(SENTENCES) + "\n")
    options = CollectOptions(
        target=tiny.target, draft=tiny.draft_good, prompts=str(tmp_path / "prompts.txt"), out=tmp_path / "out",
        source="paper", dtype="float32", unit=2, max_tokens=MAX_TOKENS, max_model_len=128, eager=True,
    )  # fmt: skip
    assert run(options) == 0
    files = sorted((tmp_path / "out" / "responses").iterdir())
    rows = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    assert len(files) == 2 and len(rows) == 3, "the last prompt is too long"
    for row in rows:
        expected: list[int] = []
        while len(expected) < MAX_TOKENS and 2 not in expected:
            (step,) = reference("target").steps([*row["prompt_token_ids"], *expected])
            expected.append(step.token)
        assert row["token_ids"] == expected
    stamps = [path.stat().st_mtime_ns for path in files]
    (tmp_path / "out" / "shards" / "00001.safetensors").unlink()
    assert run(options) == 0, "labels are made anew from the responses that are there: no second engine"
    assert [path.stat().st_mtime_ns for path in files] == stamps
    assert len(list((tmp_path / "out" / "shards").iterdir())) == 2
