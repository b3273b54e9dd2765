# SPDX-License-Identifier: Apache-2.0
"""``vllm-specdecpp check``: what it says before an engine starts is what the engine has; what cannot start is told."""

from __future__ import annotations

import json
import shlex
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import engine_harness as harness
from vllm_specdecpp import cli
from vllm_specdecpp.costs import timing
from vllm_specdecpp.engine import check, check_memory, check_run
from vllm_specdecpp.engine.shared import cost_file

SERVE = "--max-model-len 192 --dtype float32 --enforce-eager --max-num-seqs 16 --seed 0"
CURVES = {"first": {1: 1e-3}, "step": {1: 1e-3}, "verify": {1: 1e-2, 16: 1e-2, 336: 1.0}, "read": {1: 1e-3}}


def report(capsys: Any, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit status, and what ``--json`` prints."""
    capsys.readouterr()
    status = cli.main(["check", *arguments, "--json"])
    out = capsys.readouterr().out
    return status, json.loads(out[out.index("{\n") :])


def test_what_is_said_is_what_the_engine_has(tiny, reference, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(cost_file, "cache_folder", lambda: tmp_path)
    status, found = report(capsys, tiny.target, tiny.draft_good, f"--serve={SERVE}")
    assert status == 0 and found["would start"] and found["engine"]["model runner"] == "V1"
    assert "not known" in found["expected gain"]["costs"]
    words = shlex.split(found["serve"]["command"])
    assert words[:3] == ["vllm", "serve", tiny.target] and words[5:] == SERVE.split()
    with harness.engine(tiny.target, json.loads(words[4]), num_gpu_blocks_override=None) as llm:
        worker = llm.llm_engine.model_executor.driver_worker.worker
        runner, vllm_config = worker.model_runner, worker.vllm_config
        models = vllm_config.model_config, vllm_config.speculative_config.draft_model_config
        for model in models:
            parameters = reference(model.model.rpartition("/")[2]).model.parameters()
            assert check_memory.weight_bytes(model, 1) == sum(p.numel() * 4 for p in parameters)
        pages = sum(
            group.kv_cache_spec.page_size_bytes * len(group.layer_names) / group.kv_cache_spec.block_size
            for group in runner.kv_cache_config.kv_cache_groups
        )
        assert sum(check_memory.token_bytes(model, vllm_config) for model in models) == pages
        cost_file.cost_file(vllm_config, torch.device("cpu")).save(CURVES)
    _, found = report(capsys, tiny.target, tiny.draft_good, f"--serve={SERVE}")
    gains = [float(found["expected gain"][f"batch {n}"].split()[0]) for n in (1, 4, 16)]
    assert gains[0] > gains[1] > 1.5 and gains[2] == 1.0  # up to 16 rows a verification costs the same
    assert "batch 32" not in found["expected gain"]


def test_without_a_draft_model_nothing_is_counted_for_one(tiny, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(cost_file, "cache_folder", lambda: tmp_path)
    status, found = report(capsys, tiny.target, '--speculative={"sources": ["suffix"]}', f"--serve={SERVE}")
    assert status == 0 and found["pair"]["draft"].startswith("none")
    assert found["memory"]["weights of the draft"] == "0.0 MiB"
    assert found["memory"]["KV of a token"].endswith("and 0.0 KiB of the draft")
    assert "free runs" in found["expected gain"]


@pytest.mark.parametrize(
    ("arguments", "because"),
    [
        (["draft_other_vocab"], "vocabulary has 512 rows, the draft's 500"),
        (["draft_good", '--speculative={"rule": "threshold"}'], "needs an acceptance head"),
        (["draft_good", "--serve=--pipeline-parallel-size 2"], "pipeline_parallel_size=2"),
        ([], "no draft is known"),
    ],
)
def test_what_would_not_start_is_told(tiny, capsys, arguments, because):
    words = [getattr(tiny, word) if word.startswith("draft") else word for word in arguments]
    status, found = report(capsys, tiny.target, *words)
    assert status == 1 and not found["would start"] and because in found["because"]


@pytest.mark.parametrize(
    ("room", "because"), [((1 << 22, 1 << 22, 1 << 16), "hold 32 tokens"), ((9, 9, None), "weights and logits take")]
)
def test_what_does_not_fit_is_told(tiny, capsys, monkeypatch, room, because):
    monkeypatch.setattr(check_memory, "_room", lambda vllm_config: room)
    status, found = report(capsys, tiny.target, tiny.draft_good, f"--serve={SERVE}")
    assert status == 1 and because in found["because"]


def test_memory_that_vllm_would_not_find_free_is_told(tiny, capsys, monkeypatch):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    serve = f"--serve={SERVE} --gpu-memory-utilization 1.0"
    status, found = report(capsys, tiny.target, tiny.draft_good, serve)
    assert status == 1 and "vLLM wants gpu_memory_utilization=1.0" in found["because"]


@pytest.mark.parametrize("argument", ["--speculative=[1]", "--serve=--max-nonsense 3"])
def test_an_argument_that_is_none(tiny, capsys, argument):
    assert cli.main(["check", tiny.target, tiny.draft_good, argument]) == (2 if "--speculative" in argument else 1)
    assert argument.split("=")[0] in "".join(capsys.readouterr())


def test_the_report_is_a_line_a_fact():
    found = {"would start": True, "answers": {"other answers": 0, "on over off": 1.23456}}
    lines = [line.rsplit(maxsplit=1) for line in check.as_text(found).splitlines()]
    assert lines == [["would start", "yes"], [], ["answers"], ["  other answers", "0"], ["  on over off", "1.235"]]


def test_ten_answers(tiny, capsys, monkeypatch):
    monkeypatch.setattr(check_run, "PROMPTS", check_run.PROMPTS[:2])
    monkeypatch.setattr(timing, "measure", lambda *args: CURVES)
    serve = f"--serve={SERVE} --num-gpu-blocks-override 64"
    with harness.quick_collections():
        status, found = report(capsys, tiny.target, tiny.draft_good, serve, "--run", "--tokens", "8")
    assert status == 0 and found["answers"]["equal answers"] == 2 and found["answers"]["on over off"] > 0


@pytest.mark.asks(19)
def test_other_answers_are_told_from_near_ties(monkeypatch):
    """Speculation changes one token; the two likeliest are the further apart the longer the prompt is."""

    def answer(speculation: int, prompt: str, num_tokens: int, logprobs: int | None = None) -> Any:
        likely = {token: SimpleNamespace(logprob=-0.01 * token * len(prompt)) for token in (1, 2)}
        return SimpleNamespace(token_ids=[1, 7 + (speculation and prompt != "equal"), 9], logprobs=[likely])

    monkeypatch.setattr(check_run, "_answer", answer)
    monkeypatch.setattr(check_run, "_engine", nullcontext)
    monkeypatch.setattr(check_run, "PROMPTS", ("equal", "tie", "no tie at all"))
    found = check_run.compare(lambda speculation: int(speculation), 3)
    assert [found[name] for name in ("equal answers", "answers after a near tie", "other answers")] == [1, 1, 1]
    assert check_run._first_difference([1], [1, 2]) == 1
