# SPDX-License-Identifier: Apache-2.0
"""What the demo prints: rounds, the summary, where outputs part."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import demo
from benchmarks.common.engines import Generation
from benchmarks.common.methods import Method, parse_method
from benchmarks.serve.render import round_line


def test_round_line_shows_accepted_rejected_and_own_token() -> None:
    def decode(ids: Any) -> str:
        return "".join(chr(i) for i in ids)

    row = {"candidates": [ord(c) for c in "ab\nd"], "accepted": 2, "next_token": ord("x")}
    assert round_line(7, row, decode, colour=False) == "   7   2 of  4 accepted  |ab~\\nd~+x|"
    assert "\033[32mab\033[0m" in round_line(7, row, decode, colour=True)
    assert "~" not in round_line(1, {**row, "accepted": 4}, decode, colour=False)


def test_demo_summary_has_the_agreed_object() -> None:
    def answers(seconds: float, ids: list[int]) -> list[Generation]:
        return [Generation([ids], seconds, {"rounds": 2, "candidates": 7, "accepted": 5})] * 2

    results = {method: answers(1.0, [1, 2, 3, 4]) for method in demo.METHODS}
    results[Method("off")] = answers(2.0, [1, 2, 3, 4])
    results[parse_method("draft_model:6")] = answers(0.8, [1, 2, 3, 4])
    results[demo.OURS] = answers(0.5, [1, 2, 3, 4])
    table, last = demo.summary(results, 2)
    assert last == {
        "tokens_per_second": {"off": 2.0, "draft_model": 5.0, "specdecpp": 8.0},
        "best_fixed_k": 6,
        "mean_candidate_length": 3.5,
        "outputs_equal": True,
        "prompts": 2,
    }
    assert "specdecpp over the best fixed K: 1.60" in table
    results[demo.OURS] = answers(0.5, [1, 2, 3, 5])
    assert demo.summary(results, 2)[1]["outputs_equal"] is False


def test_half_of_any_first_prompts_are_code_to_edit_or_continue() -> None:
    sets = [prompt["set"] for prompt in demo.load_prompts()]
    assert sets[::2] == ["edits", "code"] * 2 and not {"edits", "code"} & set(sets[1::2])


def test_the_draft_stays_as_it_is_where_a_shrunk_one_would_be_no_faster(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(demo, "missing_kernel", lambda scheme: f"no {scheme} here")
    monkeypatch.setattr(demo, "models_folder", lambda: tmp_path)
    assert demo.shrunk(tmp_path / "draft") == tmp_path / "draft" and not list(tmp_path.iterdir())
    assert "the draft is not shrunk: no " in capsys.readouterr().err


class FakeEngines:
    """Every method takes so many seconds a token."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.now = seconds, 0.0
        self.asked: list[int] = []

    def encode(self, prompt: str) -> list[int]:
        return [1, 2, 3]

    def spec_rpc(self, method: str, clear: bool) -> list[Any]:
        return []

    def generate(self, method: Method, prompts: Any, max_tokens: int, temperature: float) -> Generation:
        self.now += self.seconds * max_tokens
        self.asked.append(max_tokens)
        return Generation([[1] * max_tokens], self.seconds * max_tokens, {})


@pytest.mark.parametrize(
    ("seconds", "tokens", "num_prompts"),
    [(0.01, 96, 8), (0.1, 73, 8), (0.3, 24, 7), (0.6, 24, 3), (5.0, 24, 1)],
)
def test_the_demo_keeps_to_its_time(seconds: float, tokens: int, num_prompts: int) -> None:
    """Slow machines give shorter answers, then fewer; one prompt is always answered by all methods."""
    engines: Any = FakeEngines(seconds)
    results, rounds = demo.measure(engines, demo.load_prompts(), 5.0, clock=lambda: engines.now)
    assert len(rounds) == num_prompts and {len(found) for found in results.values()} == {num_prompts}
    assert abs(engines.asked[-1] - tokens) <= 1
    assert engines.now <= 300 or num_prompts == 1


def processes_of(session: int) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = path.read_text().partition("(")[2].rpartition(")")
        except OSError:  # has ended
            continue
        state, _, _, of = rest.split()[:4]
        if int(of) == session and state != "Z":
            found.append(name)
    return found


DEMO = ["-m", "benchmarks.demo"]
STAND_IN = """
import subprocess, sys
from benchmarks import demo

def start(engines):
    with subprocess.Popen(["sh", "-c", "sleep 600 & sleep 600"]):
        print("started", file=sys.stderr, flush=True)

demo.Engines.start, demo.shrunk = start, lambda draft: draft
sys.exit(demo.main([]))
"""
"""Processes that start others, in the place of vLLM's."""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux only")
@pytest.mark.parametrize(
    ("number", "line", "program"),
    [
        (signal.SIGTERM, "started", ["-c", STAND_IN]),
        pytest.param(signal.SIGTERM, "starting engine 'spec'", DEMO, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "prompt 1/8", DEMO, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_demo_leaves_no_process(
    tiny: Any, tmp_path: Path, number: int, line: str, program: list[str]
) -> None:
    for name, model in ((demo.TARGET, tiny.target), (demo.DRAFT, tiny.draft_good)):
        shutil.copytree(model, tmp_path / name)
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 4096}))
    environment = os.environ | {"SPECDECPP_MODELS": str(tmp_path), "VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    with subprocess.Popen(
        [sys.executable, *program], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        lines = []
        for found in process.stderr:
            lines.append(found)
            if line in found:
                break
        else:
            raise AssertionError("".join(lines))
        while len(processes_of(process.pid)) < 3:  # with multiprocessing's tracker; pytest-timeout ends a hang
            time.sleep(0.1)
        process.send_signal(number)
        rest = process.stderr.read()
    assert process.returncode == 130, rest
    while processes_of(process.pid):  # the tracker clears away first
        time.sleep(0.1)


def test_demo_says_where_outputs_part() -> None:
    assert demo.difference([1, 2, 3], [1, 2, 3]).startswith("same")
    assert "from token 3 on" in demo.difference([1, 2, 3], [1, 2, 4])
    assert "from token 3 on" in demo.difference([1, 2, 3], [1, 2])
