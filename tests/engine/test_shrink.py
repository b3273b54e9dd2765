# SPDX-License-Identifier: Apache-2.0
"""vLLM loads what ``shrink`` writes, as an ordinary ``model``.

In bfloat16: on some CPUs int8 layers take nothing else.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests import engine_harness as harness
from tests.unit.test_shrink import decompressed, tensors
from vllm_specdecpp import cli
from vllm_specdecpp.engine import options
from vllm_specdecpp.shrink import check


def shrunk(tiny: Any, folder: Path, scheme: str) -> str:
    assert cli.main(["shrink", tiny.draft_good, "--out", str(folder), "--scheme", scheme]) == 0
    return str(folder)


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])
@pytest.mark.asks(18)
def test_vllm_reads_the_weights_that_were_written(tiny, tmp_path, scheme):
    """As many candidates are accepted as of a draft that has the quantised values in bfloat16."""
    prompts, accepted = harness.prompts(8, seed=3), []
    quantised, plain = shrunk(tiny, tmp_path / "quantised", scheme), tmp_path / "plain"
    shutil.copytree(tiny.draft_good, plain)
    save_file(tensors(tiny.draft_good) | decompressed(quantised, scheme), plain / "model.safetensors", {"format": "pt"})
    for draft in (quantised, str(plain)):
        config = {"method": "specdecpp", "model": draft, "rule": "fixed", "num_speculative_tokens": 4}
        with harness.engine(tiny.target, config, dtype="bfloat16") as llm:
            harness.generate(llm, prompts, ignore_eos=True, max_tokens=48)
            stats = llm.collective_rpc("specdecpp_stats")[0]
            accepted.append(stats["accepted"] / stats["candidates"])
    assert 0.05 < accepted[0] == pytest.approx(accepted[1], rel=0.25), accepted


def test_a_draft_of_fewer_tokens_proposes_these_alone(tiny, tmp_path, caplog):
    counts, out = tmp_path / "texts.jsonl", tmp_path / "fewer"
    counts.write_text("".join(json.dumps({"id": i, "text": f"wrap(text, {i})"}) + "\n" for i in range(60)))
    arguments = ["--scheme", "none", "--vocab", "300", "--counts", str(counts)]
    assert cli.main(["shrink", tiny.draft_good, "--out", str(out), *arguments]) == 0
    config = {"method": "specdecpp", "model": str(out), "rule": "fixed", "trace_rounds": 1000}
    with harness.engine(tiny.target, config) as llm:
        harness.generate(llm, harness.prompts(8, seed=3), ignore_eos=True, max_tokens=24)
        rounds = harness.take_rounds(llm)
    proposed = {token for r in rounds for token in r["candidates"]}
    assert sum(r["accepted"] for r in rounds) > 20
    assert len(proposed) > 50 and proposed <= set(load_file(out / "draft_vocab.safetensors")["d2t"].tolist())
    assert "draft proposes 300 of 512 token ids" in caplog.text


def test_a_head_of_the_unshrunk_draft_is_taken_with_a_warning(tiny, tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(options.logger, "warning", lambda text, *words: said.append(text % words))
    head = tmp_path / "head"
    shutil.copytree(tiny.head, head)
    config = json.loads((head / "config.json").read_text()) | {"draft": "models/draft_good"}
    (head / "config.json").write_text(json.dumps(config))
    draft = shrunk(tiny, tmp_path / "mine", "int8")
    with harness.engine(
        tiny.target, {"method": "specdecpp", "model": draft, "head": str(head)}, dtype="bfloat16"
    ) as llm:
        harness.generate(llm, harness.prompts(2), max_tokens=8)
    assert any("the draft before it was shrunk" in text for text in said)
    (head / "config.json").write_text(json.dumps(config | {"draft": "models/another"}))
    with (
        pytest.raises(ValueError, match="was trained for the draft 'models/another'"),
        harness.engine(tiny.target, {"method": "specdecpp", "model": draft, "head": str(head)}),
    ):
        pass


@pytest.fixture
def one_engine_after_the_other(monkeypatch):
    """In this process, where vLLM leaves more behind than the engine's own would."""
    from vllm.distributed import cleanup_dist_env_and_memory

    play = check.play

    def played(*args: Any) -> Any:
        try:
            return play(*args)
        finally:
            cleanup_dist_env_and_memory()

    harness.end_kept()
    monkeypatch.setattr(check, "play", played)


@pytest.mark.parametrize("trimmed", [False, True])
def test_check_plays_both_drafts_and_ends_by_what_it_says(tiny, tmp_path, capsys, trimmed, one_engine_after_the_other):
    """A draft that lacks most tokens agrees less; its folder, once made, is checked without the counts."""
    (tmp_path / "prompts.txt").write_text("def wrap(text):\nclass TextWrapper:\n")
    (tmp_path / "texts.jsonl").write_text('{"text": "9"}\n')
    draft = [tiny.draft_good, "--out", str(tmp_path / "out")]
    fewer = ["--scheme", "none", "--vocab", "160", "--counts", str(tmp_path / "texts.jsonl")]
    if trimmed:
        assert cli.main(["shrink", *draft, *fewer]) == 0
    arguments = [
        "shrink", *draft, "--check", "--target", tiny.target, "--prompts", str(tmp_path / "prompts.txt"),
        "--max-tokens", "16", "--eager", "--kv-cache-mib", "64",
        *(["--vocab", "160"] if trimmed else ["--scheme", "int8"]),
    ]  # fmt: skip
    capsys.readouterr()
    status, told = cli.main(arguments), capsys.readouterr().out
    assert status == (0 if "it pays" in told else 1)
    agreement = re.search(r"greedy agreement +([\d.]+)% +([\d.]+)%", told)
    assert agreement is not None, told
    original, shrunk = map(float, agreement.groups())
    assert original > 30 and (shrunk < original - 5 if trimmed else shrunk > 30), told
    assert told.count(", predicted, ") == 3
    assert ("it proposes 160 of 512 tokens" in told) is trimmed
