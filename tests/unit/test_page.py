# SPDX-License-Identifier: Apache-2.0
"""``GET /specdecpp``: what the middleware answers, and what a browser makes of it and of the metrics beside it."""

from __future__ import annotations

import asyncio
import html
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
import uvicorn

from tests.browser import CHROMIUM, page_of, plots_of
from tests.http_server import free_port
from vllm_specdecpp.engine.metrics import PANELS, EngineMetrics
from vllm_specdecpp.page import Page, document, policy

HOSTILE = '<img src=x onerror="document.title=1">\\\n"'
"""A model's name. Names of labels' values go into the page as text."""


async def behind(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 299, "headers": []})


def ask(path: str, method: str = "GET", root_path: str = "") -> tuple[int, dict[str, str], bytes]:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "root_path": root_path}
    asyncio.run(Page(behind)(scope, None, send))
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], headers, b"".join(message.get("body", b"") for message in sent)


@pytest.mark.parametrize(
    ("path", "method", "root_path", "status"),
    [
        ("/specdecpp", "GET", "", 200), ("/specdecpp", "HEAD", "", 200), ("/proxy/specdecpp", "GET", "/proxy", 200),
        ("/specdecpp", "POST", "", 405), ("/specdecpp", "DELETE", "", 405),
        ("/specdecpp/", "GET", "", 299), ("/v1/specdecpp", "GET", "", 299), ("/metrics", "GET", "", 299),
    ],
)  # fmt: skip
def test_one_path_is_answered_and_only_read(path: str, method: str, root_path: str, status: int) -> None:
    found, headers, body = ask(path, method, root_path)
    assert found == status and (body == document().encode()) == (status == 200 and method == "GET")
    if status == 200:
        assert headers["content-length"] == str(len(document().encode()))


def test_nothing_comes_from_elsewhere() -> None:
    directives = dict(part.split(" ", 1) for part in ask("/specdecpp")[1]["content-security-policy"].split("; "))
    assert directives["default-src"] == "'none'" and directives["connect-src"] == "'self'"
    assert all(directives[name].startswith("'sha256-") for name in ("script-src", "style-src"))
    addresses = set(re.findall(r"\w+://[\w./-]+", document()))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name
    assert policy(document()) != policy(document().replace("poll();", "poll() ;"))


@pytest.fixture
def url() -> Iterator[str]:
    """A server whose ``/metrics`` has more to tell each time it is asked."""
    metrics = EngineMetrics(HOSTILE, [0, 1])
    shown = prometheus_client.make_asgi_app()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope.get("path") == "/metrics":
            counters = [
                ("rounds", "0", 30), ("rounds", "3", 10), ("candidates", "draft", 20), ("candidates", "suffix", 10),
                ("accepted", "draft", 15), ("accepted", "suffix", 9), ("stops", "off", 30), ("requests", "min_p", 1),
                ("observed_candidates", None, 20), ("estimated_accepted", None, 16), ("observed_accepted", None, 15),
            ]  # fmt: skip
            costs = [("cost_seconds", [what, str(n)], 0.01 * n) for what in ("first", "verify") for n in (1, 8, 64)]
            one = {"counters": counters, "gauges": [("rho", [], 21.5), *costs]}
            metrics.add([one, one])
        await shown(scope, receive, send)

    port = free_port()
    server = uvicorn.Server(uvicorn.Config(Page(app), port=port, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.02)
    assert server.started
    yield f"http://127.0.0.1:{port}/specdecpp"
    server.should_exit = True
    thread.join()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_draws_it(url: str, tmp_path: Path) -> None:
    page = page_of(url, tmp_path)
    assert "every 2 s from /metrics" in page
    plots = plots_of(page)
    assert len(plots) == len(PANELS) == page.count("<section>")
    assert plots["Mean candidate length"] == "0.75"
    assert plots["Rounds at K = 0"] == "75.0 %"
    assert plots["Acceptance, estimated and observed"].split("■")[1:] == [" estimated 80.0 %  ", " observed 75.0 %"]
    assert plots["rho, tokens per second"] == "21.5"
    drawn = dict(re.findall("<section><h2>(.*?)</h2>(.*?)</section>", page, re.DOTALL))
    words = {title: re.findall("<text[^>]*>([^<]*)</text>", plot) for title, plot in drawn.items()}
    assert words["Rounds by candidate length"] == ["0", "75.0 %", "3", "25.0 %"]
    assert words["Acceptance by source"] == ["suffix", "90.0 %", "draft", "75.0 %"]
    assert drawn["Costs in force"].count("<path") == 2
    options = [html.unescape(name) for name in re.findall("<option[^>]*>(.*?)</option>", page, re.DOTALL)]
    assert options[0] == "all engines" and sum(HOSTILE in name for name in options) == 2  # others' metrics may be there
    assert "<title>specdecpp</title>" in page
