# SPDX-License-Identifier: Apache-2.0
"""What goes wrong around a server: bodies that are none, clients that vanish, and at last a worker that is killed."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from tests import engine_harness as harness
from tests.http_server import get, serve
from tests.reference_loop import answer

SECONDS = 30
"""In which a fault must have been dealt with; a hang lasts longer."""
MAX_MODEL_LEN = 16384
"""Long answers: none ends while a slow machine has yet to look, as 512 tokens did."""


@pytest.fixture(scope="module")
def url(tiny, tmp_path_factory) -> Iterator[str]:
    """A server whose worker is a process of its own. The draft is bad: answers take their time."""
    config = {"method": "specdecpp", "model": tiny.draft_rand, "rule": "entropy", "num_speculative_tokens": 5}
    arguments = [
        "--speculative-config", json.dumps(config), "--distributed-executor-backend", "mp",
        "--max-model-len", str(MAX_MODEL_LEN), "--hf-overrides", json.dumps({"max_position_embeddings": MAX_MODEL_LEN}),
    ]  # fmt: skip
    with serve(tiny.target, arguments, tmp_path_factory.mktemp("faults") / "log") as url:
        yield url


def post(url: str, body: dict[str, Any] | bytes) -> http.client.HTTPResponse:
    """The answer of ``/v1/completions``, its body unread."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=SECONDS)
    if not isinstance(body, bytes):
        body = json.dumps({"model": "tiny", "temperature": 0, "ignore_eos": True, **body}).encode()
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    return connection.getresponse()


def check_answer(url: str, reference: Any, max_tokens: int = 24) -> None:
    (prompt,) = harness.prompts(1, seed=3)
    with post(url, {"prompt": prompt, "max_tokens": max_tokens, "return_token_ids": True}) as response:
        assert json.load(response)["choices"][0]["token_ids"] == answer(reference("target"), prompt, max_tokens)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "body"), (b"{", "JSON"), (b"\xff\xfe", ""), (b"[1]", "dictionary"), (b"null", ""),
        ({}, "prompt"), ({"prompt": [5], "max_tokens": "many"}, "max_tokens"), ({"prompt": [5], "min_p": 7}, "min_p"),
        ({"prompt": [5], "logit_bias": {"5": "much"}}, "logit_bias"),
        ({"prompt": [5], "vllm_xargs": {"specdecpp": "maybe"}}, "specdecpp: extra_args"),
        ({"prompt": [5], "vllm_xargs": {"specdecpp": '{"lenght": 3}'}}, "lenght"),
        ({"prompt": [5], "vllm_xargs": {"specdecpp": {"a": 1}}}, "vllm_xargs"),
    ],
)  # fmt: skip
def test_a_malformed_body_is_a_bad_request_and_the_server_goes_on(url, reference, body, words):
    with post(url, body) as response:
        text = response.read().decode()
    assert response.status == 400 and words in json.loads(text)["error"]["message"], text
    check_answer(url, reference, max_tokens=4)


def shown(url: str, name: str) -> float:
    lines = [line for line in get(f"{url}/metrics").splitlines() if line.startswith(f"vllm:{name}")]
    assert lines, name
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def test_a_client_that_vanishes_leaves_nothing_behind_and_others_go_on(url, reference):
    ended = 'request_success_total{engine="0",finished_reason="length"'
    before = shown(url, ended)
    for prompt in harness.prompts(4, seed=5):
        with post(url, {"prompt": prompt, "max_tokens": MAX_MODEL_LEN - len(prompt), "stream": True}) as stream:
            assert stream.read(1)
            check_answer(url, reference, max_tokens=8)
        # the connection is closed here, the answer far from its end
    deadline = time.monotonic() + SECONDS
    while shown(url, "num_requests_running") or shown(url, "kv_cache_usage_perc"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert shown(url, ended) == before + 4  # the others' alone
    check_answer(url, reference)


def test_a_killed_worker_is_an_error_to_its_clients_and_ends_the_server(url):
    """Runs last: nothing is left of the server."""
    processes = psutil.Process().children(recursive=True)
    (worker,) = [p for p in processes if "VLLM::Worker" in " ".join(p.cmdline())]
    streams = [
        post(url, {"prompt": p, "max_tokens": MAX_MODEL_LEN - len(p), "stream": True}) for p in harness.prompts(2)
    ]
    for stream in streams:
        assert stream.read(1)
    told: list[str] = []

    def read(stream: http.client.HTTPResponse) -> None:
        try:
            told.append(stream.read().decode())
        except (http.client.HTTPException, OSError) as error:
            told.append(f"error: {error!r}")

    readers = [threading.Thread(target=read, args=(stream,)) for stream in streams]
    worker.kill()
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(SECONDS)
    assert len(told) == 2 and all("error" in text and "[DONE]" not in text.split("error")[0] for text in told), told
    _, alive = psutil.wait_procs(processes, timeout=SECONDS)
    assert not alive
