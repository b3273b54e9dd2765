# SPDX-License-Identifier: Apache-2.0
"""What users ask of speculation with a draft model, and the tests that show it: the table in ``docs/serving.md``.

A test says so with ``@pytest.mark.asks(number)``. ``python -m tests.asks`` writes the table anew.
"""

from __future__ import annotations

import ast
import functools
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "serving.md"
BEGIN, END = "<!-- asks: python -m tests.asks -->\n", "<!-- end of asks -->"

ASKS = {
    1: "Never slower than off, and no K to guess (15025, 21278, 8439)",
    2: "At K = 0 no draft work at all (51510)",
    3: "No threshold at which throughput falls; prompts are no decodes (49548)",
    4: "Off for one request (6993)",
    5: "`min_p` and `logit_bias` are served, at K = 0 in the same batch (42744)",
    6: "Logprobs are the target's (34497)",
    7: "Grammars hold, also where reasoning ends inside a draft (27969, 36138)",
    8: "Padded vocabularies of different sizes (5203, 7252, 10913)",
    9: "The draft's tensor-parallel size works or is refused (17499, 31345)",
    10: "A multimodal target, a text draft (33458)",
    11: "N-grams and a draft model together (46977, 6300)",
    12: "Beyond the draft's own length a request goes on at K = 0 (58080)",
    13: "Long context turns no gain into a loss (47602)",
    14: "The prefix-cache hits of off (38182, 53670)",
    15: "Prompts are not read twice before the first token (39790)",
    16: "The draft's memory is told at start-up (9995)",
    17: "Sleep, level 2 too, leaves no garbage (52479)",
    18: "A quantised draft under an unquantised target (40849, 53873)",
    19: "Drift from off is told from rounding (22987, 53436)",
    20: "Streams and tool calls with several tokens a step (55284, 49002, 30204)",
}
"""Number: what is asked for, and issues of vllm-project/vllm."""

NOTES = {
    10: "not shown: no test has a multimodal checkpoint",
    13: "in part: costs follow the service, not each request's length",
    14: "all but the block that an answer's last round has filled",
    16: "`check` tells what the draft takes before the start, the start what logits take on a GPU; it is not given "
    "back while speculation is off for long",
    17: "CPU: a Worker without vLLM's allocator; weights of level 2 are the caller's to reload, as vLLM's are",
}
"""What no test shows, or not in full."""


@functools.cache
def marked() -> dict[int, list[str]]:
    """Number: the tests that carry it, as paths below ``tests/``; of tests that run on V2 too, both."""
    found: dict[int, list[str]] = defaultdict(list)
    owners: dict[tuple[str, str], int] = {}
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.glob("tests/*/**/test_*.py"))}
    for path, tree in trees.items():
        for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
            for number in _numbers(function):
                owners[path.stem, function.name] = number
                found[number].append(_name(path, function.name))
    for path, tree in trees.items():
        for name, module, test in _borrowed(tree):
            if (shown := owners.get((module, test))) is not None:
                found[shown].append(_name(path, name))
    return {number: sorted(set(tests)) for number, tests in found.items()}


def _numbers(function: ast.FunctionDef) -> Iterator[int]:
    """Of every ``pytest.mark.asks(number)`` in the decorators."""
    for node in (inner for decorator in function.decorator_list for inner in ast.walk(decorator)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "asks":
            yield ast.literal_eval(node.args[0])


def _borrowed(tree: ast.Module) -> Iterator[tuple[str, str, str]]:
    """(name, module, test) of each ``name = module.test`` and ``from module import test`` at the top."""
    modules = {
        alias.asname or alias.name: alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(name)], value=ast.Attribute(ast.Name(module), test)):
                yield name, modules.get(module, ""), test
            case ast.ImportFrom(module=str(module), names=names):
                yield from ((alias.asname or alias.name, module.split(".")[-1], alias.name) for alias in names)


def _name(path: Path, test: str) -> str:
    return f"{path.relative_to(ROOT / 'tests')}::{test}"


def table() -> str:
    """As it stands in the page."""
    tests = marked()
    rows = ["| | asked for | shown by, in `tests/` |", "|---|---|---|"]
    for number, what in ASKS.items():
        shown = [f"`{name}`" for name in tests.get(number, [])] + ([NOTES[number]] if number in NOTES else [])
        rows.append(f"| {number} | {what} | {'; '.join(shown)} |")
    return "\n".join(rows) + "\n"


def page() -> str:
    """The page with the table of today."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END, 1)[1]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
