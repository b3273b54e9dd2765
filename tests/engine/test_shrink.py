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
from safetensors.torch import save_file

from tests import engine_harness as harness
from tests.unit.test_shrink import decompressed, tensors, tie
from vllm_specdecpp import cli
from vllm_specdecpp.costs import timing
from vllm_specdecpp.engine import options
from vllm_specdecpp.shrink import check
from vllm_specdecpp.shrink.schemes import missing_kernel


def shrunk(draft: Path | str, folder: Path, scheme: str) -> str:
    assert cli.main(["shrink", str(draft), "--out", str(folder), "--scheme", scheme]) == 0
    return str(folder)


@pytest.mark.parametrize(
    ("scheme", "tied", "ranks"),
    [("int8", False, 1), ("int8", True, 1), ("int4", False, 1), ("fp8", False, 1),
     pytest.param("int8", True, 2, marks=pytest.mark.slow)],
)  # fmt: skip
@pytest.mark.asks(18)
def test_vllm_reads_the_weights_that_were_written(tiny, tmp_path, scheme, tied, ranks):
    """As many candidates are accepted as of a draft that has the quantised values in bfloat16."""
    if scheme != "fp8" and (reason := missing_kernel(scheme)):
        pytest.skip(reason)
    prompts, accepted = harness.prompts(8, seed=3), []
    target, source = tiny.target, tiny.draft_good
    if tied:
        target, source = str(tie(target, tmp_path / "target", True)), tie(source, tmp_path / "source", True)
    quantised, plain = shrunk(source, tmp_path / "quantised", scheme), tmp_path / "plain"
    shutil.copytree(tiny.draft_good, plain)
    save_file(tensors(source) | decompressed(quantised, scheme), plain / "model.safetensors", {"format": "pt"})
    parallel = {"tensor_parallel_size": ranks, "distributed_executor_backend": "mp"} if ranks > 1 else {}
    for draft in (quantised, str(plain)):
        config = {"method": "specdecpp", "model": draft, "rule": "fixed", "num_speculative_tokens": 4}
        with harness.engine(target, config, dtype="bfloat16", **parallel) as llm:
            harness.generate(llm, prompts, ignore_eos=True, max_tokens=48)
            stats = llm.collective_rpc("specdecpp_stats")[0]
            accepted.append(stats["accepted"] / stats["candidates"])
    assert 0.05 < accepted[0] == pytest.approx(accepted[1], rel=0.25), accepted


def test_a_head_of_the_unshrunk_draft_is_taken_with_a_warning(tiny, tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(options.logger, "warning", lambda text, *words: said.append(text % words))
    head = tmp_path / "head"
    shutil.copytree(tiny.head, head)
    config = json.loads((head / "config.json").read_text()) | {"draft": "models/draft_good"}
    (head / "config.json").write_text(json.dumps(config))
    draft = shrunk(tiny.draft_good, tmp_path / "mine", "int8")
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
    monkeypatch.setattr(timing, "measure", lambda *args: harness.CHEAP)
    with harness.quick_collections():
        yield


def test_check_plays_both_drafts_and_ends_by_what_it_says(tiny, tmp_path, capsys, one_engine_after_the_other):
    """A folder that is there already, made of this draft, is only checked."""
    (tmp_path / "prompts.txt").write_text("def wrap(text):\nclass TextWrapper:\n")
    draft = [tiny.draft_good, "--out", str(tmp_path / "out")]
    assert cli.main(["shrink", *draft, "--scheme", "int8"]) == 0
    arguments = [
        "shrink", *draft, "--check", "--target", tiny.target, "--prompts", str(tmp_path / "prompts.txt"),
        "--max-tokens", "16", "--eager", "--kv-cache-mib", "64",
    ]  # fmt: skip
    capsys.readouterr()
    status, told = cli.main(arguments), capsys.readouterr().out
    assert status == (0 if "it pays" in told else 1)
    agreement = re.search(r"greedy agreement +([\d.]+)% +([\d.]+)%", told)
    assert agreement is not None, told
    assert min(map(float, agreement.groups())) > 30, told
    assert told.count(", predicted, ") == 3
