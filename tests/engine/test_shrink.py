# SPDX-License-Identifier: Apache-2.0
"""vLLM loads what ``shrink`` writes, as an ordinary ``model``. In bfloat16: on some CPUs int8 layers take nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import engine_harness as harness
from vllm_specdecpp import cli


def shrunk(tiny: Any, folder: Path, scheme: str) -> str:
    assert cli.main(["shrink", tiny.draft_good, "--out", str(folder), "--scheme", scheme]) == 0
    return str(folder)


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])
def test_a_shrunk_draft_proposes_what_the_original_would(tiny, tmp_path, scheme):
    prompts, accepted = harness.prompts(6, seed=3), []
    for draft in (tiny.draft_good, shrunk(tiny, tmp_path / "draft", scheme)):
        config = {"method": "specdecpp", "model": draft, "rule": "fixed", "num_speculative_tokens": 4}
        with harness.engine(tiny.target, config, dtype="bfloat16") as llm:
            harness.generate(llm, prompts, ignore_eos=True, max_tokens=32)
            stats = llm.collective_rpc("specdecpp_stats")[0]
            accepted.append(stats["accepted"] / stats["candidates"])
    # Weights read in another order, or without their scales, are right next to never.
    assert accepted[1] > (0.25 if scheme == "int4" else 0.6) * accepted[0] > 0.1, accepted


def test_a_head_of_the_unshrunk_draft_is_taken_with_a_warning(tiny, tmp_path, caplog):
    head = tmp_path / "head"
    shutil.copytree(tiny.head, head)
    config = json.loads((head / "config.json").read_text()) | {"draft": "models/draft_good"}
    (head / "config.json").write_text(json.dumps(config))
    draft = shrunk(tiny, tmp_path / "mine", "int8")
    with harness.engine(
        tiny.target, {"method": "specdecpp", "model": draft, "head": str(head)}, dtype="bfloat16"
    ) as llm:
        harness.generate(llm, harness.prompts(2), max_tokens=8)
    assert "the draft before it was shrunk" in caplog.text
    (head / "config.json").write_text(json.dumps(config | {"draft": "models/another"}))
    with (
        pytest.raises(ValueError, match="was trained for the draft 'models/another'"),
        harness.engine(tiny.target, {"method": "specdecpp", "model": draft, "head": str(head)}),
    ):
        pass
