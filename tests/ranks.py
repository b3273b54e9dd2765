# SPDX-License-Identifier: Apache-2.0
"""Two CPU ranks in processes of their own, forked from one in which ``plant`` puts noise in the second one's draft."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests import engine_harness as harness
from tests import tiny_models
from tests.reference_loop import GreedyModel, Rule, generate

ROOT = Path(__file__).parents[1]
START_SECONDS = 300
"""How long the ranks may take to start, and those that agree to answer."""
NOISE, ALONE = "SPECDECPP_TEST_NOISE", "SPECDECPP_TEST_ALONE"
"""Environment: standard deviation of the noise; 1: no rank listens to another."""


def play(
    plant: Callable[[], None], rules: Iterable[dict[str, Any]], prompts: list[list[int]], max_tokens: int,
    max_length: int,
) -> None:  # fmt: skip
    """The process's part: prints "ready" once the engine stands, then one JSON object: rule -> output tokens and the
    rounds of each rank."""
    from vllm.v1.executor import multiproc_executor

    # vLLM spawns them on a CPU: each would import all of it again, and know nothing of what is planted.
    multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")
    plant()
    tiny = tiny_models.ensure()
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    config = {
        "method": "specdecpp", "model": tiny.draft_good, "num_speculative_tokens": max_length, "trace_rounds": 10_000
    }  # fmt: skip
    with harness.engine(tiny.target, config, **options) as llm:
        print("ready", flush=True)
        found = {}
        for rule in rules:
            harness.configure(llm, **rule)
            llm.collective_rpc("specdecpp_rounds", kwargs={"clear": True})
            outputs = harness.generate(llm, prompts, max_tokens=max_tokens, ignore_eos=True)
            rounds = llm.collective_rpc("specdecpp_rounds", kwargs={"clear": True})
            found[rule["rule"]] = {
                "tokens": harness.token_ids(outputs), "rounds": rounds,
                "by_request": harness.rounds_of(outputs, rounds[0]),
            }  # fmt: skip
        print(json.dumps(found), flush=True)


def reference(
    target: GreedyModel, model: GreedyModel, prompts: list[list[int]], rule: Rule, max_tokens: int
) -> list[Any]:
    """What ``by_request`` should be under ``rule``: (candidates, accepted, next token) of each round."""
    limits: dict[str, Any] = {"max_tokens": max_tokens, "max_model_len": harness.MAX_MODEL_LEN}
    played = [generate(target, model, prompt, rule, **limits) for prompt in prompts]
    return [[[r.candidates, r.accepted, r.next_token] for r in rounds] for rounds, _ in played]


def run(module: str, folder: Path, *, alone: bool, seconds: float = START_SECONDS) -> dict[str, Any] | None:
    """The test's part: what ``module`` printed within ``seconds`` after it was ready, None for nothing.

    Whatever they do, they end.
    """
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, NOISE: "1.0", ALONE: str(int(alone))}
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", module],
            cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, env=environment,
        )  # fmt: skip
    try:
        ready: float | None = None
        begun = time.monotonic()
        while process.poll() is None and time.monotonic() - (ready or begun) < (seconds if ready else START_SECONDS):
            if ready is None and "ready" in log.read_text().splitlines():
                ready = time.monotonic()
            time.sleep(0.2)
        lines = log.read_text().splitlines()
        assert alone or "ready" in lines, "\n".join(lines[-40:])  # ranks that differ may hang at their start
        found = next((json.loads(line) for line in lines if line.startswith("{")), None)
        assert alone or found is not None, "\n".join(lines[-40:])
        return found
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
