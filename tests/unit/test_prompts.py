# SPDX-License-Identifier: Apache-2.0
"""Prompts from files and from the datasets library; what is wrong with them is said by line."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_specdecpp.data.prompts import Prompt, digest, load_prompts, split_by_id

FIVE_SIGMA = 5.0


def _refused(match: str):
    return pytest.raises(ValueError, match=f"^specdecpp: [^\n]*{match}[^\n]*$")


def _jsonl(path, *rows) -> str:
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n", encoding="utf-8"
    )
    return str(path)


def test_json_lines(tmp_path):
    source = _jsonl(
        tmp_path / "mine.jsonl",
        {"id": "x", "set": "alpaca", "prompt": "Größe?\n"},
        "",
        {"prompt": "two", "extra": 1},
        {"id": 7, "prompt": "three"},
        # A bare line separator is legal inside of JSON.
        '{"id": "u", "prompt": "a\u2028b"}',
    )
    assert load_prompts(source) == [
        Prompt("x", "alpaca", "Größe?\n"),
        Prompt("mine-3", "mine", "two"),
        Prompt("7", "mine", "three"),
        Prompt("u", "mine", "a\u2028b"),
    ]
    assert [p.id for p in load_prompts(source, limit=2)] == ["x", "mine-3"]
    assert len(load_prompts(source, limit=99)) == 4


def test_text(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("  one \r\n\n\ttwo\nthree", encoding="utf-8")
    found = load_prompts(str(path))
    assert found == [
        Prompt("list-1", "list", "one"),
        Prompt("list-3", "list", "two"),
        Prompt("list-4", "list", "three"),
    ]


def test_the_column_is_found_or_named(tmp_path):
    source = _jsonl(tmp_path / "a.jsonl", {"question": "q", "answer": "a", "text": "t"})
    assert load_prompts(source)[0].text == "q"
    assert load_prompts(source, column="answer")[0].text == "a"
    with _refused("line 1, has no body, but question, answer, text; name the column with --column"):
        load_prompts(source, column="body")


WRONG: dict[str, tuple[list[Any], str]] = {
    "not JSON": (['{"prompt": "a"}', '{"prompt": '], "line 2, is not valid JSON"),
    "no object": (['"a"'], "line 1, must be an object"),
    "no prompt": ([{"id": "a"}], "line 1, has no prompt or instruction or question or text, but id"),
    "nothing": ([{}], "but nothing"),
    "empty text": ([{"prompt": "a"}, {"prompt": " \n"}], "line 2: prompt=' .n' is no text"),
    "messages": ([{"prompt": [{"role": "user", "content": "x" * 999}]}], r"line 1: prompt=\[.{0,80} is no text"),
    "twice": ([{"id": 1, "prompt": "a"}, {"id": "1", "prompt": "b"}], "the id '1' is there twice"),
    "empty": ([], "holds no prompts"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_lines(tmp_path, case):
    rows, message = WRONG[case]
    source = _jsonl(tmp_path / "p.jsonl", *rows)
    with _refused(message) as failure:
        load_prompts(source)
    assert "p.jsonl" in str(failure.value)


def test_wrong_sources(tmp_path):
    for source, message in [
        (str(tmp_path / "gone.jsonl"), "gone.jsonl' cannot be read"),
        (str(tmp_path / "gone"), "gone' does not exist"),
        ("a/b/c", "'a/b/c' does not exist"),
    ]:
        with _refused(message):
            load_prompts(source)
    table = tmp_path / "p.csv"
    table.write_text("a,b\n")
    with _refused("p.csv' is neither .jsonl nor .txt"):
        load_prompts(str(table))
    table = tmp_path / "latin.txt"
    table.write_bytes("Größe".encode("latin-1"))
    with _refused("latin.txt' is not UTF-8"):
        load_prompts(str(table))


def test_a_hub_dataset(monkeypatch):
    calls = []

    def load_dataset(path, config, split):
        calls.append((path, config, split))
        return ({"instruction": f"say {i}", "output": ""} for i in range(10**9))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    found = load_prompts("org/name-1.0:part", limit=2, split="test")
    assert found == [Prompt("name-1.0-test-0", "name-1.0", "say 0"), Prompt("name-1.0-test-1", "name-1.0", "say 1")]
    load_prompts("plain", limit=1)
    assert calls == [("org/name-1.0", "part", "test"), ("plain", None, "train")]
    with _refused("org/name, row 0, has no nothing"):
        load_prompts("org/name", column="nothing")


def test_a_hub_dataset_that_fails(monkeypatch):
    def load_dataset(*_, **__):
        raise FileNotFoundError("Dataset 'org/name' doesn't exist\nand more lines")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with _refused(r"'org/name', split='train', cannot be loaded \(Dataset 'org/name' doesn't exist\)"):
        load_prompts("org/name")


def test_without_the_datasets_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with _refused(r"pip install '.\[train\]'"):
        load_prompts("org/name")


def test_the_digest_is_of_order_and_content():
    a, b = Prompt("a", "s", "x"), Prompt("b", "s", "y")
    digests = [digest(p) for p in ([a, b], [b, a], [a], [a, Prompt("b", "t", "y")], [a, Prompt("b", "s", "z")], [])]
    assert len(set(digests)) == len(digests)
    assert digest([Prompt("a", "s", "x"), b]) == digests[0]


def test_the_split_is_stable_fair_and_nested():
    ids = [f"prompt-{i}" for i in range(4000)]
    held = {i for i in ids if split_by_id(i, 0.1, 0)}
    assert abs(len(held) - 400) < FIVE_SIGMA * (4000 * 0.1 * 0.9) ** 0.5
    assert held < {i for i in ids if split_by_id(i, 0.2, 0)}, "a larger share holds the smaller one"
    other = {i for i in ids if split_by_id(i, 0.1, 1)}
    assert abs(len(held & other) - 40) < FIVE_SIGMA * (4000 * 0.01 * 0.99) ** 0.5, "seeds are independent"
    assert not any(split_by_id(i, 0.0, 0) for i in ids) and all(split_by_id(i, 1.0, 0) for i in ids)
    # Of another run, another machine: heads remember their split by seed and share only.
    assert [i for i in range(40) if split_by_id(f"prompt-{i}", 0.1, 0)] == FIXED_SPLIT


FIXED_SPLIT = [6, 7, 22]
