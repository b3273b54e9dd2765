# SPDX-License-Identifier: Apache-2.0
"""The command ``fit`` without an engine: what goes on, what is refused, who judges, and what the verdict says."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dataset_files import refused
from vllm_specdecpp.data.prompts import Prompt
from vllm_specdecpp.decision.estimator import HeadEstimator
from vllm_specdecpp.head.model import AcceptanceHead
from vllm_specdecpp.training.collect import command as collect
from vllm_specdecpp.training.fit import command
from vllm_specdecpp.training.fit.command import SETTINGS_FILE, claim, divided
from vllm_specdecpp.training.fit.options import FitOptions, settings
from vllm_specdecpp.training.fit.stages import Stage, _is_trained, head_seconds, num_done, stages_of
from vllm_specdecpp.training.fit.train import TrainOptions
from vllm_specdecpp.training.replay.tune_report import ALL, COST_AWARE_HEAD, FEW_PROMPTS, verdict

PROMPTS = [Prompt(f"p{i}", "s", f"text {i}") for i in range(40)]


def options(tiny: Any, tmp_path: Path, **changes: Any) -> FitOptions:
    (tmp_path / "prompts.txt").write_text("\n".join(prompt.text for prompt in PROMPTS))
    fields = {
        "target": tiny.target, "draft": tiny.draft_good, "prompts": str(tmp_path / "prompts.txt"),
        "out": tmp_path / "out", **changes,
    }  # fmt: skip
    return FitOptions(**fields)


def stage(name: str, done: bool) -> Stage:
    return Stage(name, Path(name), lambda: done, lambda: None)


@pytest.mark.parametrize(
    ("done", "expected"),
    [("---", 0), ("x--", 1), ("xx-", 2), ("xxx", 3), ("-x-", "b is there, but a,"), ("x-x", "c is there, but b,")],
)
def test_it_goes_on_where_it_stopped(done: str, expected: int | str) -> None:
    stages = [stage(name, mark == "x") for name, mark in zip("abc", done, strict=True)]
    if isinstance(expected, int):
        assert num_done(stages) == expected
    else:
        with refused(f"{expected}.* remove {expected[0]} to make it again"):
            num_done(stages)


@pytest.mark.parametrize(
    ("changes", "prompts", "named"),
    [
        ({"batch": 3, "kv_cache_mib": 64, "max_model_len": 64}, PROMPTS, None),
        ({"temperature": 1.0}, PROMPTS, "--temperature 0.0, not 1.0"),
        ({"max_tokens": 16}, PROMPTS, "--max-tokens 128, not 16"),
        ({"held_out": 0.5}, PROMPTS, "--held-out 0.3, not 0.5"),
        ({"draft": "draft_rand"}, PROMPTS, "--draft .*draft_good sha256:.*, not .*draft_rand sha256:"),
        ({}, PROMPTS[:39], "--prompts '40 with digest .*, not '39 with digest "),
        ({"out": "elsewhere"}, PROMPTS, None),
    ],
)
def test_other_settings_are_refused(
    tiny: Any, tmp_path: Path, changes: dict[str, Any], prompts: list[Prompt], named: str | None
) -> None:
    out = tmp_path / "out"
    claim(out, settings(options(tiny, tmp_path), PROMPTS))
    before = (out / SETTINGS_FILE).read_bytes()
    if "draft" in changes:
        changes = {"draft": getattr(tiny, changes["draft"])}
    now = settings(options(tiny, tmp_path, **changes), prompts)
    if named is None:
        claim(out, now)
    else:
        with refused(f"was made with {named}.*; give that, or name another --out"):
            claim(out, now)
    assert (out / SETTINGS_FILE).read_bytes() == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("notes.txt", "mine", "holds other files; name a new or empty folder"),
        (SETTINGS_FILE, "{", "cannot be read .*; restore it"),
        (SETTINGS_FILE, "3", "cannot be read .*; restore it"),
    ],
)
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with refused(message):
        claim(tmp_path, {"seed": 0})
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == content


def test_who_judges() -> None:
    twice = [*PROMPTS, Prompt("again", "s", PROMPTS[3].text)]
    fitted, judging = divided(twice, 0.3, 0)
    assert len(judging) == 12 and len(fitted) == 28
    assert not {p.text for p in fitted} & {p.text for p in judging}
    assert {*fitted, *judging} == set(PROMPTS)
    assert divided(PROMPTS, 0.3, 0) == (fitted, judging) != divided(PROMPTS, 0.3, 1)


@pytest.mark.parametrize(("num", "held_out"), [(1, 0.3), (2, 0.3), (40, 0.99), (40, 0.001)])
def test_too_few_prompts(num: int, held_out: float) -> None:
    with refused("too few to train a head and to judge it; give more, at best .* at least"):
        divided(PROMPTS[:num], held_out, 0)


def row(over: float, low: float, high: float, prompts: int) -> dict[str, Any]:
    ends = {"over_cost_aware": over, "over_cost_aware_low": low, "over_cost_aware_high": high}
    return {"set": ALL, "policy": COST_AWARE_HEAD, "tokens_per_second": 12.0, "prompts": prompts, **ends}


@pytest.mark.parametrize(
    ("found", "pays", "says"),
    [
        (row(1.05, 1.01, 1.09, 80), True, "on this machine pays: 12.00 predicted tokens/s with it, 11.43 with the"),
        (row(1.05, 0.99, 1.11, 80), False, "does not pay, the difference is within noise: 12.00"),
        (row(0.90, 0.85, 0.95, 80), False, "does not pay, it costs more than it brings: 12.00 predicted tokens/s"),
        (row(1.05, 1.01, 1.09, FEW_PROMPTS - 1), False, f"Too few held-out prompts .*, give {FEW_PROMPTS} or more"),
        (row(1.05, 1.01, 1.09, FEW_PROMPTS), True, r"\(\+5.0%, 95 % interval \+1.0% to \+9.0%, 30 held-out prompts\)"),
    ],
)
def test_the_verdict(found: dict[str, Any], pays: bool, says: str) -> None:
    said = verdict([{**found, "set": "s"}, found, {**found, "policy": "oracle"}])
    assert said is not None and said[0] is pays
    assert re.search(says, said[1]), said[1]
    assert verdict([{**found, "policy": "cost_aware"}]) is None


@pytest.mark.parametrize("pays", [True, False])
def test_an_interrupted_run_goes_on(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pays: bool
) -> None:
    ran: list[str] = []
    found = row(1.05, 1.01 if pays else 0.99, 1.09, 80)

    def fake(name: str, content: str) -> Stage:
        path = tmp_path / "out" / name

        def work() -> None:
            ran.append(name)
            print(f"a table of {name}")
            if ran == ["one", "tune/rows.jsonl"]:
                raise KeyboardInterrupt
            path.parent.mkdir(exist_ok=True)
            path.write_text(content)

        return Stage(name, path, path.exists, work)

    stages = [fake("one", "1"), fake("tune/rows.jsonl", json.dumps(found) + "\n")]
    monkeypatch.setattr(command, "stages_of", lambda *_: stages)
    with pytest.raises(KeyboardInterrupt):
        command.run(options(tiny, tmp_path))
    assert capsys.readouterr().out == ""
    for _ in range(2):
        assert command.run(options(tiny, tmp_path)) == 0
        sentence, which, line = capsys.readouterr().out.splitlines()
        assert sentence.startswith("A head for this pair on this machine " + ("pays" if pays else "does not pay"))
        assert which == f"Serve it {'with' if pays else 'without'} the head:"
        assert line.startswith(f"vllm serve {tiny.target} --speculative-config ") and ('"head": ' in line) is pays
    assert ran == ["one", "tune/rows.jsonl", "tune/rows.jsonl"]


def test_nothing_is_done_in_a_new_folder(tiny: Any, tmp_path: Path) -> None:
    stages = stages_of(options(tiny, tmp_path), *divided(PROMPTS, 0.3, 0))
    names = ["collect train", "collect eval", "costs", "train", "calibrate", "tune"]
    assert [(stage.name, stage.is_done()) for stage in stages] == [(name, False) for name in names]
    assert not (tmp_path / "out").exists()


def test_a_signal_in_the_last_unit_of_a_collection_ends_it_all(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first, *_) = stages_of(options(tiny, tmp_path), *divided(PROMPTS, 0.3, 0))
    monkeypatch.setattr(collect, "collect", lambda _: True)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert len((tmp_path / "out" / "data" / "train.jsonl").read_text().splitlines()) == 28


def test_a_head_that_was_trained_otherwise(tmp_path: Path) -> None:
    made = TrainOptions(data=[tmp_path], out=tmp_path)
    assert not _is_trained(made)
    content = {"options": made.model_dump(mode="json", exclude={"data", "out", "force"})}
    (tmp_path / "provenance.json").write_text(json.dumps(content))
    assert _is_trained(made)
    content["options"] |= {"soft": True, "patience": 5}  # which an earlier version wrote
    (tmp_path / "provenance.json").write_text(json.dumps(content))
    assert _is_trained(made)
    with refused("was trained with seed=0, not 1; remove it to train again, or name another --out"):
        _is_trained(made.model_copy(update={"seed": 1}))
    (tmp_path / "provenance.json").write_text("{")
    with refused("provenance.json is damaged .*; restore it, or remove .* to train again"):
        _is_trained(made)


def test_what_is_no_model_claims_no_folder(tiny: Any, tmp_path: Path) -> None:
    with refused("draft='.*nothing' cannot be loaded"):
        command.run(options(tiny, tmp_path, draft=str(tmp_path / "nothing")))
    assert not (tmp_path / "out").exists()


def test_what_a_head_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 ms more in the head are 20 ms more in a pass."""
    head = AcceptanceHead(8, 1, features=["top1_prob", "entropy", "margin"], lag=0)
    slept: list[float] = []
    scored = HeadEstimator.__call__

    def slow(self: HeadEstimator, *arguments: Any) -> torch.Tensor:
        start = time.perf_counter()
        time.sleep(0.02)
        slept.append(time.perf_counter() - start)
        return scored(self, *arguments)

    monkeypatch.setattr(HeadEstimator, "__call__", slow)
    assert 0.02 <= head_seconds(head, 64) < sum(slept) / len(slept) + 0.02
