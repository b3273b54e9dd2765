# SPDX-License-Identifier: Apache-2.0
"""The command ``collect`` without an engine: units, going on, signals, wrong input."""

from __future__ import annotations

import errno
import json
import os
import signal
from typing import Any

import pytest
import torch

from vllm_specdecpp.data.prompts import encode, load_prompts
from vllm_specdecpp.data.shard_file import RoundRecord, shard_from_rounds, write_shard
from vllm_specdecpp.data.shards import Dataset, open_dataset
from vllm_specdecpp.training.collect import command as collect
from vllm_specdecpp.training.collect.command import make_manifest, run
from vllm_specdecpp.training.collect.on_policy import UnitSummary
from vllm_specdecpp.training.collect.options import CollectOptions
from vllm_specdecpp.training.collect.responses import write_responses
from vllm_specdecpp.training.collect.stop_signal import stop_on_signal
from vllm_specdecpp.training.engine import environment

NUM_PROMPTS, UNIT = 7, 2


@pytest.fixture
def options(tiny, tmp_path):
    lines = [json.dumps({"id": f"p{i}", "set": "s", "prompt": f"text {i}"}) for i in range(NUM_PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return CollectOptions(
        target=tiny.target, draft=tiny.draft_good, prompts=str(tmp_path / "prompts.jsonl"), out=tmp_path / "data",
        unit=UNIT, dtype="float32",
    )  # fmt: skip


class FakeCollector:
    """Writes one round a prompt; notes what it was asked."""

    calls: list[int] = []
    num_closed = 0
    before_unit: dict[int, Any] = {}

    def __init__(self, options: CollectOptions, dataset: Dataset) -> None:
        self.dataset, self.manifest = dataset, dataset.manifest

    def collect(self, unit_index: int, prompts: list[Any]) -> UnitSummary:
        FakeCollector.calls.append(unit_index)
        if unit_index in self.before_unit:
            self.before_unit[unit_index]()
        scalars = torch.full((1,), 0.5)
        rounds = [
            RoundRecord(
                request_id=p.id, hidden_states=torch.zeros(1, self.manifest.hidden_size), token_ids=[3],
                top1_prob=scalars, entropy=scalars, margin=scalars, soft_label=scalars,
                num_accepted=1, num_verified=1, emitted=1, temperature=0.0,
            )
            for p in prompts
        ]  # fmt: skip
        shard = shard_from_rounds(rounds, {p.id: {"id": p.id, "set": p.set} for p in prompts})
        write_shard(self.dataset.shard_path(unit_index), shard, self.manifest)
        return UnitSummary(skipped=0, tokens=len(prompts), observed=len(prompts), seconds=0.1)

    def close(self) -> None:
        FakeCollector.num_closed += 1


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    monkeypatch.setattr(collect, "OnPolicyCollector", FakeCollector)
    FakeCollector.calls, FakeCollector.num_closed, FakeCollector.before_unit = [], 0, {}
    return FakeCollector


def test_every_prompt_once(options, fake, capsys):
    assert run(options) == 0
    assert fake.calls == [0, 1, 2, 3] and fake.num_closed == 1
    shards = list(open_dataset(options.out).shards())
    assert [p["id"] for s in shards for p in s.prompts] == [f"p{i}" for i in range(NUM_PROMPTS)]
    assert f"{NUM_PROMPTS} labels (100.0 % accepted)" in capsys.readouterr().out


def test_going_on_does_what_is_missing(options, fake):
    run(options)
    open_dataset(options.out).shard_path(1).unlink()
    damaged = open_dataset(options.out).shard_path(2)
    damaged.write_bytes(damaged.read_bytes()[:-8])
    fake.calls.clear()
    assert run(options) == 0
    assert fake.calls == [1, 2]
    fake.calls.clear()
    assert run(options) == 0
    assert fake.calls == [] and fake.num_closed == 2  # no models are loaded for nothing


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_after_the_unit(options, fake, capsys, number):
    fake.before_unit = {1: lambda: os.kill(os.getpid(), number)}
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        run(options)
    assert fake.calls == [0, 1] and fake.num_closed == 1
    assert open_dataset(options.out).done_units() == {0, 1}
    assert "stopping after this unit" in capsys.readouterr().err
    assert signal.getsignal(number) is before
    fake.before_unit = {}
    assert run(options) == 0
    assert fake.calls == [0, 1, 2, 3]


def test_a_signal_in_the_last_unit_interrupts_nothing(options, fake):
    """But whoever has more to do is told."""
    fake.before_unit = {3: lambda: os.kill(os.getpid(), signal.SIGINT)}
    assert run(options) == 0
    open_dataset(options.out).shard_path(3).unlink()
    assert collect.collect(options) and not collect.collect(options)


def test_a_second_signal_interrupts_at_once(options, fake):
    def twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    fake.before_unit = {1: twice}
    with pytest.raises(KeyboardInterrupt):
        run(options)
    assert open_dataset(options.out).done_units() == {0}
    assert fake.num_closed == 1


def test_an_engine_that_dies_of_the_signal_is_an_interruption(options, fake):
    def die() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError("the engine is dead")

    fake.before_unit = {1: die}
    with pytest.raises(KeyboardInterrupt):
        run(options)
    assert open_dataset(options.out).done_units() == {0}


def test_an_error_keeps_what_is_finished(options, fake):
    def full() -> None:
        raise ValueError("specdecpp: the disk is full")

    fake.before_unit = {2: full}
    with pytest.raises(ValueError, match="full"):
        run(options)
    assert open_dataset(options.out).done_units() == {0, 1} and fake.num_closed == 1


@pytest.mark.parametrize(
    "change", [{"temperature": 0.5}, {"candidates": 3}, {"max_tokens": 9}, {"unit": 3}, {"seed": 4}]
)
def test_other_settings_do_not_mix(options, fake, change):
    run(options)
    other = options.model_copy(update=change)
    with pytest.raises(ValueError, match="^specdecpp: ") as caught:
        run(other)
    assert "\n" not in str(caught.value)
    assert fake.calls == [0, 1, 2, 3]
    assert run(other.model_copy(update={"force": True})) == 0
    assert len(fake.calls) > 4
    if "unit" not in change:
        assert open_dataset(options.out).done_units() == {0, 1, 2, 3}


def test_the_manifest_tells_what_was_asked(options):
    prompts = load_prompts(options.prompts, None)
    made = make_manifest(options, prompts)
    assert (made.source, made.num_prompts, made.unit_size) == ("on-policy", NUM_PROMPTS, UNIT)
    assert made.target.endswith("/target") and made.draft.endswith("/draft_good")
    assert made.hidden_size == 64 and made.sampling["temperature"] == 0.0
    assert make_manifest(options, prompts[1:]).prompts_digest != made.prompts_digest


@pytest.mark.parametrize("field", ["target", "draft"])
def test_a_model_that_is_not_there(options, fake, field):
    with pytest.raises(ValueError, match=f"^specdecpp: {field}='/nowhere' cannot be loaded") as caught:
        run(options.model_copy(update={field: "/nowhere"}))
    assert "\n" not in str(caught.value)
    assert fake.calls == [] and not options.out.exists()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"max_tokens": 2}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"candidates": 129}, "candidates"),
        ({"batch": 0}, "batch"),
        ({"unit": 0}, "unit"),
        ({"limit": 0}, "limit"),
        ({"ray": 0}, "ray"),
        ({"target": ""}, "target"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_wrong_options(options, change, word):
    with pytest.raises(ValueError, match=word):
        CollectOptions(**{**options.model_dump(), **change})


def test_every_option_is_explained():
    for name, field in CollectOptions.model_fields.items():
        assert field.description and len(field.description) > 10, name


class FakeTokenizer:
    def __init__(self, chat_template: str | None) -> None:
        self.chat_template = chat_template

    def apply_chat_template(self, messages: Any, add_generation_prompt: bool, tokenize: bool) -> str:
        assert add_generation_prompt and not tokenize
        return f"<u>{messages[0]['content']}<a>"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [ord(c) for c in text]


def test_prompts_go_into_the_chat_template():
    assert encode(FakeTokenizer("template"), "x") == [ord(c) for c in "<u>x<a>"]  # no second start token
    assert encode(FakeTokenizer(None), "x") == [1, ord("x")]


def test_responses_are_whole_or_not_there(tmp_path, monkeypatch):
    write_responses(tmp_path, 3, [{"id": "a"}, {"id": "ü"}])
    path = tmp_path / "responses" / "00003.jsonl"
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["a", "ü"]

    def full(source: Any, target: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ValueError, match=r"^specdecpp: .*the disk is full; free space") as caught:
        write_responses(tmp_path, 3, [{"id": "b"}])
    assert "\n" not in str(caught.value)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert json.loads(path.read_text().splitlines()[0]) == {"id": "a"}


def test_signals_are_left_as_they_were():
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with stop_on_signal() as stop:
        seen = [stop.requested]
        os.kill(os.getpid(), signal.SIGTERM)
        seen.append(stop.requested)
    assert seen == [False, True]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("before", [None, "1"])
def test_an_environment_variable_is_left_as_it_was(monkeypatch, before):
    monkeypatch.setenv("X", before) if before else monkeypatch.delenv("X", raising=False)
    with pytest.raises(ZeroDivisionError), environment("X", "0"):
        assert os.environ["X"] == "0"
        raise ZeroDivisionError
    assert os.environ.get("X") == before
