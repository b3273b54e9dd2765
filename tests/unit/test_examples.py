# SPDX-License-Identifier: Apache-2.0
"""The examples, with an engine that only notes what it was given."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

vllm = pytest.importorskip("vllm")

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_offline_batch_says_what_it_waits_for_and_asks_for_a_cache_of_its_size(monkeypatch, capsys):
    """On a CPU vLLM refuses to start where 92 % of the memory are not free, unless the cache's size is given."""
    given: dict[str, Any] = {}

    class Engine:
        def __init__(self, **options: Any) -> None:
            given.update(options, printed=capsys.readouterr().out)

        def chat(self, messages: list[Any], params: Any) -> list[Any]:
            return [SimpleNamespace(outputs=[SimpleNamespace(text="an answer")]) for _ in messages]

        def collective_rpc(self, name: str) -> list[dict[str, int]]:
            return [{"rounds": 2, "candidates": 5, "accepted": 4}]

    monkeypatch.setattr(vllm, "LLM", Engine)
    monkeypatch.setattr("sys.argv", ["offline_batch.py", "TARGET", "DRAFT"])
    runpy.run_path(str(EXAMPLES / "offline_batch.py"), run_name="__main__")
    assert given["model"] == "TARGET" and given["speculative_config"] == {"method": "specdecpp", "model": "DRAFT"}
    assert given["kv_cache_memory_bytes"] > 0 and "minute" in given["printed"]
    assert "mean candidate length 2.50, 4 accepted" in capsys.readouterr().out
