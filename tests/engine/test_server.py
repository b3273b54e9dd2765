# SPDX-License-Identifier: Apache-2.0
"""vLLM's OpenAI server on loopback with our method: separate processes, the bare word and JSON, the openai client; and
what goes wrong around it: bodies that are none, clients that vanish, and at last a worker that is killed."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

import psutil
import pytest

from tests import engine_harness as harness
from tests.browser import CHROMIUM, page_of, plots_of
from tests.doc_tables import dashboard
from tests.http_server import SEVERAL, START_SECONDS, free_port, get, serve
from tests.reference_loop import answer
from vllm_specdecpp.engine.metrics import GAUGES
from vllm_specdecpp.engine.metrics import exposed as exposed_as
from vllm_specdecpp.page import document

openai = pytest.importorskip("openai")

NUM_REQUESTS = 8
MAX_TOKENS = 24
MAX_MODEL_LEN = 16384
"""Room for long answers: none ends while a slow machine has yet to look, as 512 tokens did."""
SECONDS = 120
"""In which a fault must have been dealt with; a hang lasts longer."""
KEY = "secret"


# Slow: test_lossless starts an engine by the bare word; and whether the default rule drafts depends on the clock.
@pytest.fixture(scope="module", params=[pytest.param("bare word", marks=pytest.mark.slow), "JSON"])
def server(request, tiny, tmp_path_factory):
    """Two API servers, each with the page, before one engine, whose worker is a process of its own."""
    folder = tmp_path_factory.mktemp("server")
    log = folder / "server.log"
    arguments = [
        "--api-server-count", "2", "--api-key", KEY, "--middleware", "vllm_specdecpp.page.Page",
        "--distributed-executor-backend", "mp", "--max-model-len", str(MAX_MODEL_LEN),
        "--hf-overrides", json.dumps({"max_position_embeddings": MAX_MODEL_LEN}),
    ]  # fmt: skip
    if request.param == "bare word":
        pairs = folder / "pairs.json"
        pairs.write_text(json.dumps({tiny.target: {"draft": tiny.draft_good, "head": tiny.head}}))
        config, environment = "specdecpp", {"SPECDECPP_PAIRS": str(pairs)}
    else:
        options = {"method": "specdecpp", "model": tiny.draft_good, "rule": "entropy", "num_speculative_tokens": 5}
        config, environment = json.dumps(options), {}
    arguments += ["--speculative-config", config]
    with serve(tiny.target, arguments, log, module=SEVERAL, **environment) as url:
        yield url, log


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key=KEY, timeout=60, max_retries=0)


@pytest.fixture(scope="module")
def answers(reference):
    """What the target alone says to each prompt, by the oracle: token ids."""
    return [answer(reference("target"), prompt, MAX_TOKENS) for prompt in harness.prompts(NUM_REQUESTS, seed=12)]


def _at_once(ask: Any, arguments: Any) -> list[Any]:
    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        return list(pool.map(ask, arguments))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streaming"])
@pytest.mark.asks(20)
def test_completions(client, answers, stream):
    parts: list[int] = []

    def ask(prompt: list[int]) -> list[int]:
        answer = client.completions.create(
            model="tiny", prompt=prompt, max_tokens=MAX_TOKENS, temperature=0, stream=stream,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )  # fmt: skip
        if not stream:
            assert answer.choices[0].text
            return answer.choices[0].token_ids
        chunks = [chunk.choices[0] for chunk in answer if chunk.choices]
        assert any(c.text for c in chunks)
        parts.append(len(chunks))
        return [token for c in chunks for token in c.token_ids or ()]

    assert _at_once(ask, harness.prompts(NUM_REQUESTS, seed=12)) == answers
    assert not stream or max(parts) > 2  # a busy server sends single answers whole


def test_chat_completions(client):
    def ask(argument: tuple[str, bool]) -> str:
        question, stream = argument
        answer = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": question}], max_tokens=MAX_TOKENS, temperature=0,
            stream=stream,
        )  # fmt: skip
        if not stream:
            return answer.choices[0].message.content
        return "".join(chunk.choices[0].delta.content or "" for chunk in answer if chunk.choices)

    questions = [f"what is {n} times {n}?" for n in range(NUM_REQUESTS)]
    whole = _at_once(ask, [(q, False) for q in questions])
    assert all(whole) and len(set(whole)) > 1
    assert _at_once(ask, [(q, True) for q in questions]) == whole


def test_sampling_and_several_choices(client):
    answer = client.completions.create(
        model="tiny", prompt=[5, 6, 7], max_tokens=8, temperature=1.0, n=4, seed=3, extra_body={"ignore_eos": True}
    )
    assert len(answer.choices) == 4
    assert answer.usage.completion_tokens == 32


def test_a_bad_request_is_refused_and_the_next_one_served(client):
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt=[5] * (MAX_MODEL_LEN + 1), max_tokens=4)
    assert client.completions.create(model="tiny", prompt=[5, 6], max_tokens=4, temperature=0).choices


def _totals(url: str) -> dict[str, float]:
    """Name -> sum over the labels, of our counters and vLLM's counters of drafts, once they stand still: what counts
    the last step may come after its answer."""
    last: dict[str, float] = {}
    while True:
        found: dict[str, float] = defaultdict(float)
        for line in get(f"{url}/metrics").splitlines():
            if line.startswith(("vllm:specdecpp_", "vllm:spec_decode_num_")) and "_total" in line:
                found[line.split("{")[0]] += float(line.rsplit(" ", 1)[1])
        if found == last:
            return {name.removeprefix("vllm:").removesuffix("_total"): total for name, total in found.items()}
        last = found
        time.sleep(0.1)


def _counters(url: str) -> dict[str, float]:
    """vLLM's own."""
    return {
        name.removeprefix("spec_decode_num_"): total
        for name, total in _totals(url).items()
        if name.startswith("spec_decode_num_")
    }


def test_speculation_took_place(server, client):
    """The server's own counters: candidates were drafted, and some accepted."""
    client.completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=MAX_TOKENS, temperature=0)
    counters = _counters(server[0])
    assert counters["draft_tokens"] > counters["accepted_tokens"] > 0
    assert "specdecpp: draft" in server[1].read_text()


@pytest.mark.parametrize("switch", ["off", False, '{"num_speculative_tokens": 0}'])
@pytest.mark.asks(4)
def test_one_request_without_speculation(server, client, answers, switch):
    before = _counters(server[0])
    answer = client.completions.create(
        model="tiny", prompt=harness.prompts(NUM_REQUESTS, seed=12)[0], max_tokens=MAX_TOKENS, temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True, "vllm_xargs": {"specdecpp": switch}},
    )  # fmt: skip
    assert answer.choices[0].token_ids == answers[0]
    assert _counters(server[0]) == before


@pytest.mark.asks(5)
@pytest.mark.parametrize("asked", [{"logit_bias": {"7": 100}}, {"min_p": 0.2}])
def test_what_vllm_refuses_with_speculation_is_served_without_candidates(server, client, asked):
    before = _counters(server[0])
    body = {"ignore_eos": True, "return_token_ids": True, **asked}
    (choice,) = client.completions.create(
        model="tiny", prompt=[5, 6], max_tokens=6, temperature=0.7, extra_body=body
    ).choices
    assert len(choice.token_ids) == 6 and ("logit_bias" not in asked or set(choice.token_ids) == {7})
    assert _counters(server[0]) == before


TOOL = {
    "type": "function",
    "function": {
        "name": "book",
        "parameters": {
            "type": "object",
            "properties": {
                "seat": {"type": "string", "enum": ["aisle", "window", "middle"]},
                "count": {"type": "integer", "maximum": 99},
                "note": {"type": "string", "minLength": 30, "maxLength": 60},
            },
            "required": ["seat", "count", "note"],
            "additionalProperties": False,
        },
    },
}  # fmt: skip


@pytest.mark.asks(20)
def test_tool_calls_stream_as_they_come_whole(server, client):
    """Of a function that is named: arguments by a grammar, several tokens a step."""
    before = _counters(server[0])
    arguments: dict[str, Any] = {
        "model": "tiny", "messages": [{"role": "user", "content": "book a seat"}], "tools": [TOOL], "temperature": 0,
        "max_tokens": 100, "tool_choice": {"type": "function", "function": {"name": "book"}},
    }  # fmt: skip
    (whole,) = client.chat.completions.create(**arguments).choices[0].message.tool_calls
    assert set(json.loads(whole.function.arguments)) == {"seat", "count", "note"}
    calls = [
        call.function
        for chunk in client.chat.completions.create(**arguments, stream=True)
        if chunk.choices
        for call in chunk.choices[0].delta.tool_calls or ()
    ]
    assert "".join(call.arguments or "" for call in calls) == whole.function.arguments
    assert [call.name for call in calls if call.name] == ["book"]
    assert not _drafts(server) or _counters(server[0])["accepted_tokens"] > before["accepted_tokens"]


@pytest.mark.asks(20)
def test_the_responses_api_streams_as_it_answers_whole(server, client):
    arguments: dict[str, Any] = {
        "model": "tiny", "input": "what is 3 times 4?", "max_output_tokens": MAX_TOKENS, "temperature": 0
    }  # fmt: skip
    whole = client.responses.create(**arguments).output_text
    events = client.responses.create(**arguments, stream=True)
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole != ""


def test_one_request_with_its_own_bound(server, client):
    before = _counters(server[0])
    client.completions.create(
        model="tiny", prompt=[5, 6, 7], max_tokens=MAX_TOKENS, temperature=0,
        extra_body={"ignore_eos": True, "vllm_xargs": {"specdecpp": '{"num_speculative_tokens": 1}'}},
    )  # fmt: skip
    after = _counters(server[0])
    rounds = after["drafts"] - before["drafts"]
    assert rounds > 0
    assert after["draft_tokens"] - before["draft_tokens"] == rounds


@pytest.mark.parametrize("switch", ["maybe", '{"num_speculative_tokens": -3}', '{"lenght": 3}', 7])
def test_a_bad_switch_is_a_bad_request(client, switch):
    with pytest.raises(openai.BadRequestError, match="specdecpp: extra_args"):
        client.completions.create(
            model="tiny", prompt=[5, 6], max_tokens=4, extra_body={"vllm_xargs": {"specdecpp": switch}}
        )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--speculative-config", '{"method": "specdecpp", "threshold": 2}'], ["threshold=2"]),
        (["--spec-method", "specdecpp", "--spec-tokens", "0"], ["num_speculative_tokens=0"]),
    ],
)
@pytest.mark.slow  # test_options parses these flags and has the error's frames, test_bad_input has the messages
def test_command_line_errors(tiny, tmp_path, arguments, words):
    """The last line that a user sees on the terminal says what is wrong."""
    env = {**os.environ, "SPECDECPP_PAIRS": str(tmp_path / "pairs.json")}
    (tmp_path / "pairs.json").write_text(json.dumps({tiny.target: {"draft": tiny.draft_good}}))
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", tiny.target, "--port", str(free_port())
    ]  # fmt: skip
    done = subprocess.run([*command, *arguments], env=env, capture_output=True, text=True, timeout=START_SECONDS)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "specdecpp: " in last, done.stderr[-2000:]
    for word in words:
        assert word in last


@pytest.mark.slow  # test_options parses these flags
def test_spec_model_flags(tiny, tmp_path):
    """``--spec-method specdecpp --spec-model D --spec-tokens N``, and an answer."""
    arguments = ["--spec-method", "specdecpp", "--spec-model", tiny.draft_good, "--spec-tokens", "4"]
    with serve(tiny.target, arguments, tmp_path / "log") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=60, max_retries=0)
        assert client.completions.create(model="tiny", prompt=[5, 6], max_tokens=4, temperature=0).choices[0].text
        log = (tmp_path / "log").read_text()
    assert "specdecpp: draft" in log and "0 to 4" in log


def _drafts(server: tuple[str, Path]) -> bool:
    """Whether it drafts for sure: what the default rule does depends on the clock."""
    return "rule entropy" in server[1].read_text()


def _check_metrics(url: str, drafts: bool = True) -> None:
    totals = _totals(url)
    assert totals["specdecpp_candidates"] == totals["spec_decode_num_draft_tokens"]
    assert totals["specdecpp_accepted"] == totals["spec_decode_num_accepted_tokens"]
    assert totals["specdecpp_rounds"] == totals["specdecpp_stops"] > 0
    assert not drafts or totals["specdecpp_accepted"] > 0


def test_metrics_reconcile_and_dashboard_and_page_ask_for_those_that_exist(server, client):
    for stream in (False, True):  # a stream that is not read to its end is aborted
        client.completions.create(
            model="tiny", prompt=[5, 6, 7], max_tokens=MAX_TOKENS, temperature=0, stream=stream,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
    _check_metrics(server[0], _drafts(server))
    exposed = set(re.findall(r"^# TYPE (\S+)", get(f"{server[0]}/metrics"), re.MULTILINE))
    panels = json.loads(dashboard())["panels"]
    asked = {name for panel in panels for t in panel["targets"] for name in re.findall(r"vllm:\w+", t["expr"])}
    unset = {exposed_as(name) for name in GAUGES}  # by rules that learn; several servers show what is set alone
    assert len(asked) > 12 and asked <= exposed | unset
    assert set(re.findall(r"vllm:\w+", document())) == asked


def test_each_api_server_has_the_page_and_the_sums_of_all(server, tmp_path):
    """Neither asks for the key; whichever server answers."""
    url = server[0]
    _check_metrics(url, _drafts(server))
    for _ in range(6):
        assert get(f"{url}/specdecpp") == document()
    with pytest.raises(HTTPError, match="401"):
        get(f"{url}/v1/models")
    if CHROMIUM:
        page = page_of(f"{url}/specdecpp", tmp_path / "browser")
        assert "every 2 s from /metrics" in page
        assert plots_of(page)["Candidates by source"] == "since the server started"


@pytest.mark.slow  # two engines
def test_two_data_parallel_ranks(tiny, answers, tmp_path):
    """Each rank drafts, and answers as the target alone would."""
    config = {"method": "specdecpp", "model": tiny.draft_good, "rule": "confidence", "num_speculative_tokens": 5}
    arguments = ["--data-parallel-size", "2", "--speculative-config", json.dumps(config)]
    with serve(tiny.target, arguments, tmp_path / "log") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=60, max_retries=0)

        def ask(prompt: list[int]) -> list[int]:
            answer = client.completions.create(
                model="tiny", prompt=prompt, max_tokens=MAX_TOKENS, temperature=0,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )  # fmt: skip
            return answer.choices[0].token_ids

        assert _at_once(ask, harness.prompts(NUM_REQUESTS, seed=12)) == answers
        accepted = {
            line.partition('engine="')[2][0]: float(line.rsplit(" ", 1)[1])
            for line in get(f"{url}/metrics").splitlines()
            if line.startswith("vllm:spec_decode_num_accepted_tokens_total")
        }
        _check_metrics(url)
        assert 'vllm:specdecpp_draft_passes_total{engine="1"' in get(f"{url}/metrics")
    assert accepted.keys() == {"0", "1"} and min(accepted.values()) > 0


def post(url: str, body: dict[str, Any] | bytes) -> http.client.HTTPResponse:
    """The answer of ``/v1/completions``, its body unread."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=SECONDS)
    if not isinstance(body, bytes):
        body = json.dumps({"model": "tiny", "temperature": 0, "ignore_eos": True, **body}).encode()
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    connection.request("POST", "/v1/completions", body, headers)
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
def test_a_malformed_body_is_a_bad_request_and_the_server_goes_on(server, reference, body, words):
    url = server[0]
    with post(url, body) as response:
        text = response.read().decode()
    assert response.status == 400 and words in json.loads(text)["error"]["message"], text
    check_answer(url, reference, max_tokens=4)


def shown(url: str, name: str) -> float:
    lines = [line for line in get(f"{url}/metrics").splitlines() if line.startswith(f"vllm:{name}")]
    assert lines, name
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def test_a_client_that_vanishes_leaves_nothing_behind_and_others_go_on(server, reference):
    url = server[0]
    ended = 'request_success_total{engine="0",finished_reason="length"'
    _totals(url)  # of the tests before: they stand still
    before = shown(url, ended)
    for prompt in harness.prompts(4, seed=5):
        with post(url, {"prompt": prompt, "max_tokens": MAX_MODEL_LEN - len(prompt), "stream": True}) as stream:
            assert stream.read(1)
            check_answer(url, reference, max_tokens=8)
        # the connection is closed here, the answer far from its end
    deadline = time.monotonic() + SECONDS
    while shown(url, "num_requests_running") or shown(url, "kv_cache_usage_perc") or shown(url, ended) < before + 4:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert shown(url, ended) == before + 4  # the others' alone
    check_answer(url, reference)


def test_a_killed_worker_is_an_error_to_its_clients_and_ends_the_server(server):
    """Runs last of those with the server, of which nothing is left."""
    url = server[0]
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
