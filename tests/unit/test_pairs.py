# SPDX-License-Identifier: Apache-2.0
"""The registry of known pairs: the built-in file, the user's file, and the lookup."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_specdecpp import pairs
from vllm_specdecpp.pairs import find_pair, known_pairs

CODER = "Qwen/Qwen2.5-Coder-1.5B-Instruct"


@pytest.fixture(autouse=True)
def user_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keeps the developer's own pairs file out of the tests."""
    path = tmp_path / "default" / "pairs.json"
    monkeypatch.delenv(pairs.USER_FILE_VARIABLE, raising=False)
    monkeypatch.setattr(pairs, "DEFAULT_USER_FILE", path)
    return path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_built_in_pairs() -> None:
    found = known_pairs()
    paper = found["meta-llama/Llama-2-70b-chat-hf"]
    assert (paper.draft, paper.head) == ("meta-llama/Llama-2-7b-chat-hf", "hacky/acchead-llama2-chat-7bx70b")
    assert (found[CODER].draft, found[CODER].head) == ("Qwen/Qwen2.5-Coder-0.5B-Instruct", None)
    assert all(target == pair.target != pair.draft for target, pair in found.items())


def test_published_head_folders_name_their_own_pair() -> None:
    """The folder ``draft--to--target`` of a published head must be that of the pair it is listed under."""
    alias = {"TinyLlama-1.1B-Chat-v1.0": "tiny-llama-1.1b", "Llama-2-13b-hf": "llama-2-13b"}

    def short(name: str) -> str:
        last = name.rsplit("/", 1)[-1]
        return alias.get(last, last.lower())

    heads = [pair for pair in known_pairs().values() if (pair.head or "").startswith("ArcticHuaji/")]
    assert len(heads) == 7
    for pair in heads:
        assert pair.head is not None
        assert pair.head.split("/")[2] == f"{short(pair.draft)}--to--{short(pair.target)}"


@pytest.mark.parametrize(
    "target",
    [
        CODER,
        CODER.lower(),
        CODER.upper(),
        f"/models/{CODER.rsplit('/', 1)[-1]}",
        "~/m/qwen2.5-coder-1.5b-instruct/",
        "./Qwen2.5-Coder-1.5B-Instruct",
        "/cache/hub/models--Qwen--Qwen2.5-Coder-1.5B-Instruct/snapshots/0123abcd",
    ],
)
def test_find_by_hub_id_or_folder(target: str) -> None:
    assert find_pair(target).draft == "Qwen/Qwen2.5-Coder-0.5B-Instruct"


def test_find_by_relative_folder_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "Qwen3-14B").mkdir(parents=True)
    assert find_pair("models/Qwen3-14B").draft == "Qwen/Qwen3-1.7B"


def checkpoint(folder: Path, **origin: str) -> Path:
    """A folder as a model's, with what ``benchmarks.models.fetch`` says of its origin."""
    write(folder / "config.json", "{}")
    if origin:
        write(folder / "source.json", json.dumps(origin))
    return folder


def test_folders_that_the_demo_makes_go_by_their_origin(tmp_path: Path) -> None:
    hub, packages = tmp_path / "hub", tmp_path / "packages"
    checkpoint(hub / "qwen2.5-coder-1.5b", hub=CODER, revision="r")
    assert find_pair(str(hub / "qwen2.5-coder-1.5b")).draft == "Qwen/Qwen2.5-Coder-0.5B-Instruct"
    target = checkpoint(packages / "qwen2.5-coder-1.5b", same_model_on_the_hub=CODER, gguf_sha256="s")
    checkpoint(packages / "a-draft-of-another", hub="Qwen/Qwen3-0.6B")
    draft = checkpoint(packages / "qwen2.5-coder-0.5b", same_model_on_the_hub="Qwen/Qwen2.5-Coder-0.5B-Instruct")
    assert find_pair(str(target)).draft == str(draft)
    # Its origin counts, not its name.
    checkpoint(tmp_path / "Qwen3-14B", hub="someone/else")
    with pytest.raises(ValueError, match="no draft is known"):
        find_pair(str(tmp_path / "Qwen3-14B"))


def test_a_draft_beside_the_target_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft = checkpoint(tmp_path / "Qwen3-14B"), checkpoint(tmp_path / "qwen3-1.7b")
    pair = find_pair(str(target))
    assert pair.draft == str(draft) and pair.head is not None
    (draft / "config.json").unlink()  # no model's folder
    assert find_pair(str(target)).draft == "Qwen/Qwen3-1.7B"
    (target / "source.json").write_text("[]")  # of no use
    assert find_pair(str(target)).draft == "Qwen/Qwen3-1.7B"
    assert find_pair("Qwen/Qwen3-14B").draft == "Qwen/Qwen3-1.7B"


@pytest.mark.parametrize("target", ["someone/Qwen3-14B", "Qwen3-14B", "/models/Qwen/Qwen3-14B-finetuned", "/"])
def test_unknown_target_names_the_nearest_and_shows_the_json(target: str, user_file: Path) -> None:
    with pytest.raises(ValueError) as caught:
        find_pair(target)
    text = str(caught.value)
    assert text.startswith(f"specdecpp: no draft is known for target {target!r}") and "\n" not in text
    assert "are, the nearest Qwen/Qwen" in text and ("Qwen3-14B" not in target or "Qwen/Qwen3-14B" in text)
    assert '--speculative-config \'{"method": "specdecpp", "model": "DRAFT"}\'' in text
    assert text.endswith(f'write {{"{target}": {{"draft": "DRAFT", "head": null}}}} to {user_file}')


def test_the_json_that_the_error_shows_works(user_file: Path) -> None:
    with pytest.raises(ValueError) as caught:
        find_pair("org/new")
    shown = str(caught.value).split("or write ")[1].rsplit(" to ", 1)[0]
    write(user_file, shown)
    assert find_pair("org/new").draft == "DRAFT"


def test_the_users_entries_win_in_any_case(user_file: Path) -> None:
    write(user_file, json.dumps({CODER.lower(): {"draft": "mine", "head": "my/head"}}))
    pair = find_pair(CODER)
    assert (pair.draft, pair.head) == ("mine", "my/head")
    assert CODER not in known_pairs() and "Qwen/Qwen3-14B" in known_pairs()


def test_the_file_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = write(tmp_path / "named.json", '{"a/b": {"draft": "c/d"}}')
    monkeypatch.setenv(pairs.USER_FILE_VARIABLE, str(named))
    assert find_pair("a/b").draft == "c/d"


def test_a_file_that_was_asked_for_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = tmp_path / "missing.json"
    monkeypatch.setenv(pairs.USER_FILE_VARIABLE, str(missing))
    with pytest.raises(ValueError, match="missing.json cannot be read"):
        find_pair(CODER)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Invalid JSON"),
        ("", "Invalid JSON"),
        ("[]", "Input should be an object"),
        ('{"t": "d"}', "t='d': Input should be an object"),
        ('{"t": {}}', "t.draft: Field required"),
        ('{"t": {"draft": 3}}', "t.draft=3: Input should be a valid string"),
        ('{"t": {"draft": "d", "hed": "h"}}', "t.hed='h': Extra inputs are not permitted"),
    ],
)
def test_a_malformed_file_is_named_in_one_line(user_file: Path, text: str, message: str) -> None:
    write(user_file, text)
    with pytest.raises(ValueError) as caught:
        find_pair(CODER)
    assert str(caught.value).startswith(f"specdecpp: {user_file} is damaged")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def config(folder: Path, **fields: Any) -> str:
    """A model's folder that nothing but its configuration tells apart."""
    write(folder / "config.json", json.dumps(fields))
    return str(folder)


QWEN_7B = {"model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "vocab_size": 152064}


@pytest.mark.parametrize(
    ("name", "fields", "draft"),
    [
        ("mine", QWEN_7B, "Qwen/Qwen2.5-0.5B-Instruct"),
        ("our-coder-awq", QWEN_7B | {"quantization_config": {}}, "Qwen/Qwen2.5-Coder-0.5B-Instruct"),
        ("deepseek-r1-7b", QWEN_7B, "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"),
        ("grown", QWEN_7B | {"vocab_size": 151936 + 64}, "Qwen/Qwen2.5-0.5B-Instruct"),
        ("inside", {"model_type": "vlm", "text_config": QWEN_7B}, "Qwen/Qwen2.5-0.5B-Instruct"),
        ("llama-3", {"model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "vocab_size": 128256},
         "meta-llama/Llama-3.2-1B-Instruct"),
        ("llama-2", {"model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "vocab_size": 32000},
         "meta-llama/Llama-2-7b-chat-hf"),
    ],
)  # fmt: skip
def test_a_copy_goes_by_its_configuration(tmp_path: Path, name: str, fields: dict[str, Any], draft: str) -> None:
    target = config(tmp_path / name, **fields)
    assert find_pair(target).draft == draft
    beside = checkpoint(tmp_path / draft.rsplit("/", 1)[-1])
    assert find_pair(target).draft == str(beside)


@pytest.mark.parametrize(
    "change", [{"model_type": "qwen3"}, {"hidden_size": 3585}, {"vocab_size": 100_000}, {"vocab_size": "x"}]
)
def test_another_configuration_is_no_copy(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no draft is known"):
        find_pair(config(tmp_path / "mine", **(QWEN_7B | change)))


def test_a_quantised_copy_on_the_hub_goes_by_its_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    fetched = Path(config(tmp_path, **QWEN_7B)) / "config.json"
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *names: {("org/q-awq", "config.json"): fetched}[names]
    )
    assert find_pair("org/q-awq").draft == "Qwen/Qwen2.5-0.5B-Instruct"
    with pytest.raises(ValueError, match="no draft is known for target 'org/other'"):
        find_pair("org/other")
