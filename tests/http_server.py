# SPDX-License-Identifier: Apache-2.0
"""vLLM's OpenAI server on loopback, as processes of its own, with a tiny model."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests import engine_harness as harness

START_SECONDS = 450
STOP_SECONDS = 30
API_SERVER = "vllm.entrypoints.openai.api_server"
SEVERAL = "vllm.entrypoints.cli.main"
"""The module that knows ``--api-server-count``."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as response:
        return response.read().decode()


@contextmanager
def serve(
    target: str, speculative: list[str], log: Path, module: str = API_SERVER, **environment: str
) -> Iterator[str]:
    """The server's base URL; its process group is ended by id, whatever happens."""
    port = free_port()
    command = [
        sys.executable, "-m", module, *(["serve"] if module.endswith("cli.main") else []), "--model", target,
        "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
        "--enforce-eager",
        "--max-model-len", str(harness.MAX_MODEL_LEN), "--max-num-seqs", "8",
        "--enable-auto-tool-choice", "--tool-call-parser", "pythonic",
        "--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}', *speculative,
    ]  # fmt: skip
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO", **environment}
    with log.open("w") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                get(f"{url}/health")
                break
            except OSError:
                assert process.poll() is None, f"the server ended:\n{log.read_text()[-3000:]}"
                assert time.monotonic() < deadline, f"no answer in {START_SECONDS} s:\n{log.read_text()[-3000:]}"
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(STOP_SECONDS)
