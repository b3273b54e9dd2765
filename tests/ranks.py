# SPDX-License-Identifier: Apache-2.0
"""Two CPU ranks in processes of their own, forked from one in which ``plant`` puts noise in the second one's draft."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests import engine_harness as harness
from tests import tiny_models, trimmed
from tests.reference_loop import GreedyModel, Rule, generate

ROOT = Path(__file__).parents[1]
START_SECONDS = 300
"""How long the ranks may take to start, and those that agree to answer."""
NOISE, ALONE, WRONG_ROWS = "SPECDECPP_TEST_NOISE", "SPECDECPP_TEST_ALONE", "SPECDECPP_TEST_WRONG_ROWS"
"""Environment: standard deviation of the noise; 1: no rank listens to another; 1: the second one's rows of the draft's
output layer are other tokens'."""
TOKEN_IDS = [token for token in range(tiny_models.VOCAB_SIZE) if token % 8 != 3]
"""That the draft proposes."""


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
    plant_wrong_rows()
    tiny = tiny_models.ensure()
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        draft = trimmed.save(tiny.draft_good, Path(folder) / "draft", TOKEN_IDS)
        config = {
            "method": "specdecpp", "model": draft, "num_speculative_tokens": max_length, "trace_rounds": 10_000
        }  # fmt: skip
        llm = stack.enter_context(harness.engine(tiny.target, config, **options))
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


def plant_wrong_rows() -> None:
    """See :data:`WRONG_ROWS`."""
    from vllm_specdecpp.engine.shared import output_layer

    original = output_layer._rows
    if os.environ[WRONG_ROWS] == "1":
        output_layer._rows = lambda layer, mine, token_ids: original(
            layer, mine.roll(1, dims=0) if layer.tp_rank == 1 else mine, token_ids
        )


def reference(target: GreedyModel, draft: str, prompts: list[list[int]], rule: Rule, max_tokens: int) -> list[Any]:
    """What ``by_request`` should be under ``rule``: (candidates, accepted, next token) of each round."""
    model = trimmed.oracle(draft, TOKEN_IDS)
    limits: dict[str, Any] = {"max_tokens": max_tokens, "max_model_len": harness.MAX_MODEL_LEN}
    played = [generate(target, model, prompt, rule, **limits) for prompt in prompts]
    return [[[r.candidates, r.accepted, r.next_token] for r in rounds] for rounds, _ in played]


def run(
    module: str, folder: Path, *, alone: bool, wrong_rows: bool = False, seconds: float = START_SECONDS
) -> dict[str, Any] | None:
    """The test's part: what ``module`` printed within ``seconds`` after it was ready, None for nothing.

    Whatever they do, they end.
    """
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, NOISE: "1.0", ALONE: str(int(alone))}
    environment[WRONG_ROWS] = str(int(wrong_rows))
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
