# SPDX-License-Identifier: Apache-2.0
"""Benchmark rows of known figures, prompts in files, and engines that answer at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.common.engines import Engines, Generation
from benchmarks.common.methods import Method

SETTINGS = {"pair": "T + D", "temperature": 0.0, "batch": 1, "max_tokens": 128, "eager": True}
METHODS = ["off", "draft_model:K=2", "draft_model:K=4", "confidence"]
PROVENANCE = {"methods": METHODS, "command": "python -m benchmarks.campaign", "versions": {"vllm": "0"}, "git": "abc"}
# Seconds that 100 tokens take.
SECONDS = {"off": 20.0, "draft_model:K=2": 12.5, "draft_model:K=4": 10.0, "confidence": 8.0}


def raw_row(prompt: str, method: str, **changes: Any) -> dict[str, Any]:
    drafted = {"rounds": 0, "candidates": 0, "accepted": 0}
    if method != "off":
        drafted = {"rounds": 25, "candidates": 100, "accepted": 75}
    row = {"prompt": prompt, "set": prompt.split("-")[0], "method": method, "seconds": SECONDS[method], "tokens": 100}
    return {**row, **drafted, "output": "same", "equals_off": None} | changes


def all_rows() -> list[dict[str, Any]]:
    return [raw_row(f"{name}-{i}", method) for name in ("a", "b") for i in range(3) for method in METHODS]


def write_prompts(folder: Path, name: str, count: int) -> None:
    lines = [json.dumps({"id": f"{name}-{i}", "set": name, "prompt": f"question {i}"}) for i in range(count)]
    (folder / f"eval_{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


class FakeEngines(Engines):
    """Answers at once; an answer's tokens depend on the prompt only, so that every method agrees with off."""

    calls: list[tuple[str, int]] = []
    die_after: int | None = None

    def start(self) -> None:
        pass

    def encode(self, prompt: str) -> list[int]:
        return [ord(letter) for letter in prompt]

    def generate(self, method: Method, prompts: Any, max_tokens: int, *_: Any, **__: Any) -> Generation:
        if max_tokens == 8:  # the measured ones; warm-up asks for 24
            if FakeEngines.die_after == len(FakeEngines.calls):
                raise KeyboardInterrupt
            FakeEngines.calls.append((method.label, prompts[0][-1]))
        counters = (
            {"rounds": 2, "candidates": 6, "accepted": 4}
            if method.name != "off"
            else dict.fromkeys(("rounds", "candidates", "accepted"), 0)
        )
        return Generation([list(ids[-4:]) for ids in prompts], 0.5, counters)
