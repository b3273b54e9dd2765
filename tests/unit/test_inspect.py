# SPDX-License-Identifier: Apache-2.0
"""``inspect`` of heads, datasets and costs files."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from tests.tiny_models import HIDDEN_SIZE
from vllm_specdecpp.head.model import AcceptanceHead
from vllm_specdecpp.training import inspect as command
from vllm_specdecpp.training.inspect import InspectOptions, facts


def _shown(what, capsys, **options) -> str:
    assert command.run(InspectOptions(what=str(what), **options)) == 0
    return capsys.readouterr().out


@pytest.fixture
def trained_head(tmp_path):
    """A head as train, calibrate and tune leave it."""
    folder = tmp_path / "head"
    head = AcceptanceHead(HIDDEN_SIZE, 2, tied=False, features=("entropy",), lag=0)
    head.metadata = {
        "target": "org/big", "draft": "org/it's small", "w_rej": 3.0, "soft": True,
        "rule": {"rule": "threshold", "threshold": 0.35, "num_speculative_tokens": 9, "tuned_on": "12 prompts of d"},
    }  # fmt: skip
    head.calibration = {"slope": 0.875, "intercepts": [0.25] * 12, "fitted_on": "held-out prompts"}
    head.save_pretrained(folder)
    provenance = {
        "command": "vllm-specdecpp train data/a", "git": "abc-dirty", "created": "2026-01-02T03:04:05+00:00",
        "data": [{"folder": "a", "manifest": {"source": "on-policy", "num_prompts": 77}}],
        "metrics": {"val_log_loss": 0.31234567, "num_rows": 5005},
    }  # fmt: skip
    (folder / "provenance.json").write_text(json.dumps(provenance))
    figures = {"auc": 0.9125, "log_loss": 0.25, "brier": 0.1, "ece": 0.0125, "num": 4321}
    rows = [{"set": "gsm8k", "estimator": name, **figures} for name in ("head", "entropy")]
    (folder / "calibration").mkdir()
    (folder / "calibration" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_trained_head(trained_head, capsys):
    text = _shown(trained_head, capsys)
    for expected in (
        "acceptance head", "2, untied", "the pass before the draw (lag 0)", "entropy", "org/big", "org/it's small",
        "abc-dirty", "vllm-specdecpp train data/a", "source on-policy, num_prompts 77", "0.3123", "5005",
        "0.875", "held-out prompts", "... (12 in all)", "0.35", "12 prompts of d", "vllm serve org/big",
    ):  # fmt: skip
        assert expected in text, expected
    assert "gsm8k: head" in text and "auc 0.9125, log_loss 0.25, ece 0.0125, num 4321" in text
    lines = text.replace(str(trained_head), "head").splitlines()
    assert max(map(len, lines)) < 200 and len(lines) < 50, "one screen"


def test_json_holds_everything(trained_head, capsys):
    found = json.loads(_shown(trained_head, capsys, json=True))
    assert found["calibration"]["intercepts"] == [0.25] * 12
    assert found["pair"] == {"target": "org/big", "draft": "org/it's small"}
    assert found["training"]["val_log_loss"] == 0.31234567
    assert found["architecture"]["features"] == ["entropy"]


def test_a_released_head_says_what_is_missing(tiny, capsys):
    text = _shown(tiny.head, capsys)
    assert "3, tied" in text and "(lag 1)" in text
    assert "no provenance.json" in text and "vllm-specdecpp calibrate" in text and "vllm-specdecpp tune" in text
    assert "vllm serve TARGET" in text


def test_the_serve_command_is_one_a_shell_understands(trained_head):
    import shlex

    commands = {name: shlex.split(text) for name, text in facts(str(trained_head))["serve"].items()}
    assert all(words[:4] == ["vllm", "serve", "org/big", "--speculative-config"] for words in commands.values())
    expected = {"method": "specdecpp", "model": "org/it's small", "head": str(trained_head)}
    # The tuned bound belongs to the tuned rule: the default one needs room.
    tuned = {**expected, "rule": "threshold", "num_speculative_tokens": 9}
    assert [json.loads(words[4]) for words in commands.values()] == [expected, tuned]


def test_a_dataset(tmp_path, capsys):
    from vllm_specdecpp.data.shards import Manifest, RoundRecord, create_dataset, shard_from_rounds, write_shard

    manifest = Manifest(
        target="org/big", draft="org/small", hidden_size=4, source="on-policy",
        sampling={"temperature": 0.5}, num_candidates=3, prompts_digest="d", num_prompts=5, unit_size=2,
        versions={"torch": "9.9"}, git="abc", command="vllm-specdecpp collect ...", created="2026-01-02",
    )  # fmt: skip
    dataset = create_dataset(tmp_path / "data", manifest, False)
    column = torch.full((3,), 0.5)
    record = RoundRecord("r", torch.zeros(3, 4), [5, 6, 7], column, column, column, column, 1, 3, 0, 0.5)
    write_shard(dataset.shard_path(1), shard_from_rounds([record], {"r": {"id": "p", "set": "s"}}), manifest)
    text = _shown(tmp_path / "data", capsys)
    for expected in ("dataset of rounds, on-policy", "org/big", "1 of 3", "temperature 0.5", "9.9", "2026-01-02"):
        assert expected in text, expected
    found = facts(str(tmp_path / "data"))["content"]
    assert (found["steps"], found["observed"], found["accepted"], found["rounds"]) == (3, 2, 1, 1)
    assert found["acceptance_rate"] == 0.5


def test_a_model_is_told_to_be_one(tiny):
    with pytest.raises(ValueError, match=r"^specdecpp: .*target is a model \(LlamaForCausalLM\), and neither a head"):
        facts(tiny.target)


@pytest.mark.parametrize("name", ["nothing", "empty", "file.json", "damaged"])
def test_what_is_none_of_them(tmp_path, trained_head, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.json").write_text("[]")
    shutil.copytree(trained_head, tmp_path / "damaged")
    (tmp_path / "damaged" / "provenance.json").write_text('{"data": 3}')
    with pytest.raises(ValueError, match="^specdecpp: ") as failure:
        facts(str(tmp_path / name))
    assert name in str(failure.value) and "\n" not in str(failure.value)


@pytest.fixture
def engine_costs(tmp_path):
    """A file as the engine leaves it."""
    from vllm_specdecpp.costs.file import CostFile

    costs = CostFile(tmp_path, {"target": "org/big", "draft": "org/small", "device": "a machine"})
    curves = {
        "first": {1: 0.051}, "step": {1: 0.052, 2: 0.054}, "verify": {1: 0.16, 8: 0.22, 21: 0.38}, "read": {64: 0.123},
    }  # fmt: skip
    costs.save(curves, {"slope": 0.875})
    return costs.path


def test_costs_of_the_engine(engine_costs, tmp_path, capsys):
    plot = tmp_path / "costs.png"
    text = _shown(engine_costs, capsys, plot=plot)
    for expected in (
        "an engine measured", "org/big", "a machine", "1 0.052, 2 0.054", "1 0.16, 8 0.22, 21 0.38", "64 0.123",
        "0.875",
    ):  # fmt: skip
        assert expected in text, expected
    assert plot.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="plot=.*exists; name another file"):
        command.run(InspectOptions(what=str(engine_costs), plot=plot))


def test_damaged_costs_of_the_engine(engine_costs):
    engine_costs.write_text(engine_costs.read_text().replace("0.22", "-0.22"))
    with pytest.raises(ValueError, match="is damaged"):
        facts(str(engine_costs))


def test_only_costs_are_drawn(trained_head, tmp_path):
    with pytest.raises(ValueError, match="only costs are drawn, not this .acceptance head."):
        command.run(InspectOptions(what=str(trained_head), plot=tmp_path / "x.png"))
