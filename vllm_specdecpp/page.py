# SPDX-License-Identifier: Apache-2.0
"""``GET /specdecpp``: live plots of the metrics, for people without Grafana.

Off unless asked for: ``vllm serve ... --middleware vllm_specdecpp.page.Page``. The page is one document, which asks the
server that it came from for ``metrics`` and nothing else; as vLLM's ``/metrics`` it needs no API key.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from vllm_specdecpp.engine.metrics import GAUGES, PANELS, exposed

PATH = "/specdecpp"


def document() -> str:
    """The page, with the panels in it."""
    panels = [
        {
            **panel._asdict(),
            "of": {legend: exposed(name) for legend, name in panel.of.items()},
            "over": panel.over and exposed(panel.over),
            "gauge": any(name in GAUGES for name in panel.of.values()),
        }
        for panel in PANELS
    ]
    text = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return text.replace('"PANELS"', json.dumps(panels))


def policy(text: str) -> str:
    """Content-Security-Policy of a document: its own script and style, requests to its own server, nothing else."""

    def own(element: str) -> str:
        (inside,) = re.findall(rf"<{element}>(.*?)</{element}>", text, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {own('script')}; style-src {own('style')}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class Page:
    """ASGI middleware that answers for one path; all else goes on to ``app``."""

    def __init__(self, app: Any) -> None:
        self._app = app
        text = document()
        self._body = text.encode()
        headers = {
            "content-type": "text/html; charset=utf-8", "content-length": str(len(self._body)),
            "content-security-policy": policy(text), "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer", "cache-control": "no-store",
        }  # fmt: skip
        self._headers = [(name.encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"].removeprefix(scope.get("root_path", "")) != PATH:
            await self._app(scope, receive, send)
            return
        status, headers, body = 200, self._headers, self._body
        if scope["method"] not in ("GET", "HEAD"):
            status, headers, body = 405, [(b"allow", b"GET, HEAD"), (b"content-length", b"0")], b""
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
