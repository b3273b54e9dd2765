# SPDX-License-Identifier: Apache-2.0
"""The command ``train``: from a dataset folder to a head that the engine loads, and every refusal in one line."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dataset_files import make_manifest
from vllm_specdecpp import cli
from vllm_specdecpp.data.dataset import LabelRows, load_rows
from vllm_specdecpp.data.prompts import split_by_id
from vllm_specdecpp.data.shard_file import RoundRecord, shard_from_rounds, write_shard
from vllm_specdecpp.data.shards import create_dataset
from vllm_specdecpp.head.model import AcceptanceHead
from vllm_specdecpp.training.fit import train
from vllm_specdecpp.training.fit.fitting import PATIENCE, evaluate, score
from vllm_specdecpp.training.fit.held_out import name_digest, training_data
from vllm_specdecpp.training.fit.train import TrainOptions, advice_on, run, train_head

HIDDEN, PROMPTS_A_UNIT, ROUNDS_A_PROMPT, NUM_CANDIDATES = 6, 10, 6, 4
QUICK: dict[str, Any] = {"layers": 1, "lr": 3e-3, "epochs": 4, "batch_size": 64, "validation": 0.25}
ENOUGH: dict[str, Any] = {"lr": 0.02, "epochs": 20, "dropout": 0.1, "weight_decay": 0.1}
"""To learn a few hundred rows by heart."""
PAPERS: dict[str, Any] = {
    "lag": 1, "width": None, "layers": 3, "tied": True, "features": ["none"], "standardize": False, "w_rej": 6.0,
    "lr": 5e-5, "batch_size": 32, "epochs": 3, "dropout": 0.0, "weight_decay": 0.0,
}  # fmt: skip
"""SpecDec++ (arXiv:2405.19715): its head, its loss and its optimiser."""


def make_round(request: str, emitted: int, generator: torch.Generator, all_of: int | None) -> RoundRecord:
    """A candidate is accepted if the first dimension of the state that yields it, and that reads it, is large."""
    hidden = torch.randn(NUM_CANDIDATES, HIDDEN, generator=generator)
    hidden[1:, 1] = hidden[:-1, 0]  # the pass that reads candidate k also knows
    accepted = (hidden[:, 0] > -0.5).long()
    num_accepted = int(accepted.cumprod(0).sum()) if all_of is None else all_of
    scalars = {name: torch.rand(NUM_CANDIDATES, generator=generator) for name in ("top1_prob", "entropy", "margin")}
    return RoundRecord(
        request_id=request, hidden_states=hidden.bfloat16(), token_ids=[1] * NUM_CANDIDATES, **scalars,
        soft_label=torch.full((NUM_CANDIDATES,), math.nan), num_accepted=num_accepted, num_verified=NUM_CANDIDATES,
        emitted=emitted, temperature=0.0,
    )  # fmt: skip


def make_dataset(folder: Path, units: int = 4, all_of: int | None = None, **changes: Any) -> Path:
    """``all_of``: every round accepts so many."""
    manifest = make_manifest(**{"draft": "org/small", "hidden_size": HIDDEN, "prompts_digest": "0", **changes})
    dataset = create_dataset(folder, manifest, force=False)
    for unit in range(units):
        generator = torch.Generator().manual_seed(unit)
        ids = [f"{manifest.prompts_digest}-{unit * PROMPTS_A_UNIT + i}" for i in range(PROMPTS_A_UNIT)]
        rounds = [make_round(i, r * 3, generator, all_of) for i in ids for r in range(ROUNDS_A_PROMPT)]
        shard = shard_from_rounds(rounds, {i: {"id": i, "set": "a"} for i in ids})
        write_shard(dataset.shard_path(unit), shard, manifest)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "train")


def options(data: Path | list[Path], out: Path, **changes: Any) -> TrainOptions:
    return TrainOptions(data=data if isinstance(data, list) else [data], out=out, **{**QUICK, **changes})


class TestRun:
    @pytest.mark.parametrize(
        "changes",
        [{}, {"lag": 1}, {"width": 0}, {"width": 4, "layers": 2, "tied": False, "w_rej": 6.0},
         {"features": ["none"]}, {"features": ["entropy"], "standardize": False, "validation": 0.0, "layers": 0}],
    )  # fmt: skip
    def test_the_engine_can_load_it(self, data: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
        settings = options(data, tmp_path / "head", **changes)
        assert run(settings) == 0
        head = AcceptanceHead.from_pretrained(
            tmp_path / "head", expected_hidden_size=HIDDEN, expected_draft="models/Small"
        )
        assert (head.lag, head.width, head.num_layers) == (settings.lag, settings.width, settings.layers)
        assert list(head.features) == settings.resolved_features and head.standardize is settings.standardize
        assert head.tied is (settings.tied or settings.layers == 0) and not head.training
        metadata = {"w_rej": settings.w_rej, "draft": "org/small", "target": "org/target"}
        assert head.metadata == metadata
        names = ["config.json", "log.csv", "model.safetensors", "provenance.json"]
        assert sorted(path.name for path in (tmp_path / "head").iterdir()) == names

    def test_its_log_and_provenance(self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run(options(data, tmp_path / "head", seed=3))
        log = list(csv.DictReader((tmp_path / "head" / "log.csv").open()))
        assert [row["epoch"] for row in log] == ["0", "1", "2", "3", "4"]
        made = json.loads((tmp_path / "head" / "provenance.json").read_text())
        assert made["data"][0]["folder"] == "train" and made["data"][0]["manifest"]["draft"] == "org/small"
        assert (made["seed"], made["validation"], made["options"]["lr"]) == (3, 0.25, 3e-3)
        assert {"command", "git", "versions", "created", "features", "metrics"} < made.keys()
        assert str(tmp_path) not in json.dumps(made)  # no machine paths

        val_rows = load_rows([data], 0, prompts_where=lambda prompt: split_by_id(prompt[0], 0.25, 3))
        head = AcceptanceHead.from_pretrained(tmp_path / "head")
        metrics = made["metrics"]
        assert metrics["num_validation_rows"] == len(val_rows)
        assert metrics["num_rows"] == len(load_rows([data], 0)) - len(val_rows)
        best = min(float(row["val_log_loss"]) for row in log)
        assert metrics["val_log_loss"] == pytest.approx(best, rel=1e-5)
        assert evaluate(head, val_rows, 1.0)["log_loss"] == pytest.approx(best, rel=1e-5)
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["val_auc"] == metrics["val_auc"]

    @pytest.mark.parametrize("lag", [0, 1])
    def test_it_learns_what_was_planted(self, data: Path, tmp_path: Path, lag: int) -> None:
        run(options(data, tmp_path / "head", lag=lag, **ENOUGH))
        made = json.loads((tmp_path / "head" / "provenance.json").read_text())
        assert made["metrics"]["val_auc"] > 0.95

    def test_held_out_prompts_train_nothing(self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[Any] = []
        original = train.train_head

        def spy(rows: Any, val_rows: Any, *rest: Any) -> Any:
            seen.extend((rows, val_rows))
            return original(rows, val_rows, *rest)

        monkeypatch.setattr(train, "train_head", spy)
        run(options(data, tmp_path / "head", epochs=1))
        trained_on, held_out = ({rows.prompts[i][0] for i in rows.prompt.tolist()} for rows in seen)
        assert trained_on and held_out and not trained_on & held_out
        assert trained_on | held_out == {f"0-{i}" for i in range(40)}

    def test_same_seed_same_bytes(self, data: Path, tmp_path: Path) -> None:
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            run(options(data, tmp_path / name, seed=seed, epochs=2))
        a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
        assert a == b != c

    def test_two_datasets_of_one_pair(self, data: Path, tmp_path: Path) -> None:
        other = make_dataset(tmp_path / "other", units=1, prompts_digest="1")
        again = make_dataset(tmp_path / "again", units=1)  # prompts of data
        run(options([data, other, again], tmp_path / "head", epochs=1))
        made = json.loads((tmp_path / "head" / "provenance.json").read_text())
        assert [entry["folder"] for entry in made["data"]] == ["train", "other", "again"]
        num_rows = made["metrics"]["num_rows"] + made["metrics"]["num_validation_rows"]
        assert num_rows == len(load_rows([data, other, again], 0))
        ids = sorted(f"{prefix}-{i}" for prefix, num in (("0", 40), ("1", 10)) for i in range(num))
        assert made["prompts"] == {
            part: [name_digest((each, "a")) for each in ids if split_by_id(each, 0.25, 0) == held_out]
            for part, held_out in (("fitted", False), ("held_out", True))
        }
        found = training_data(tmp_path / "head")  # is told even when the datasets are gone
        assert all(found.knows((each, "a")) for each in ids)
        assert not found.knows((ids[0], "b")) and not found.knows(("new", "a"))

    def test_the_scores_are_the_engines(self, data: Path, tmp_path: Path) -> None:
        """What training computes of a row is what HeadEstimator computes of the same step."""
        from vllm_specdecpp.decision.estimator import HeadEstimator
        from vllm_specdecpp.decision.features import StepFeatures

        run(options(data, tmp_path / "head", epochs=1))
        head = AcceptanceHead.from_pretrained(tmp_path / "head")
        assert head.features
        rows = load_rows([data], 0).select(torch.arange(7))
        with torch.no_grad():
            trained = score(head, rows.hidden, rows.scalars).sigmoid()
        scalars: dict[str, Any] = dict(rows.scalars)
        served = HeadEstimator(head)(StepFeatures(rows.hidden, **scalars), 1)
        assert torch.equal(trained, served)


class TestDefaults:
    """What a user gets who names the data and a folder, and nothing else."""

    def test_the_head(self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["train", str(data), "--out", str(tmp_path / "head")]) == 0
        head = AcceptanceHead.from_pretrained(tmp_path / "head")
        assert (head.lag, head.width, head.num_layers, head.standardize) == (0, 16, 1, True)
        assert list(head.features) == ["top1_prob", "entropy", "margin"]
        captured = capsys.readouterr()
        said = json.loads(captured.out)
        log = list(csv.DictReader((tmp_path / "head" / "log.csv").open()))
        assert said["val_log_loss_at_start"] == pytest.approx(float(log[0]["val_log_loss"]), abs=1e-6)
        assert said["num_validation_prompts"] == sum(split_by_id(f"0-{i}", 0.2, 0) for i in range(40))
        # Few rows: the last of 15 epochs is the best.
        assert said["best_epoch"] == 15 and "the last epoch was the best; try --epochs 30" in captured.err

    def test_a_hidden_state_that_tells_is_used_and_one_that_does_not_does_no_harm(self) -> None:
        """Rows as many as of a small collection; the scalars tell half of it."""

        def rows(seed: int, weight: float, num_rows: int) -> LabelRows:
            generator = torch.Generator().manual_seed(seed)
            hidden = torch.randn(num_rows, 64, generator=generator)
            guess = torch.randn(num_rows, generator=generator)
            known = weight * hidden[:, :8].sum(1) / 8**0.5 + 2 * guess + 1
            accepted = torch.bernoulli(known.sigmoid(), generator=generator)
            scalars = {"top1_prob": guess.sigmoid(), "entropy": guess.exp(), "margin": guess.exp()}
            prompt = torch.arange(num_rows) // 50
            names = tuple((str(i), "a") for i in range(int(prompt[-1]) + 1))
            return LabelRows(
                hidden, scalars, torch.ones(num_rows, dtype=torch.int64), accepted,
                torch.full((num_rows,), math.nan), prompt, names,
            )  # fmt: skip

        gains = []
        for weight in (1.0, 0.0):
            judged = rows(2, weight, 6000)
            losses: list[float] = []
            started: dict[str, Any] = {"lr": 1e-9, "epochs": 1}
            for changes in (started, {}):
                settings = TrainOptions(data=[Path("d")], out=Path("o"), **changes)
                head, _ = train_head(rows(0, weight, 12_000), rows(1, weight, 3000), settings)
                losses.append(evaluate(head, judged, 1.0)["log_loss"])
            gains.append(losses[0] - losses[1])
        assert gains[0] > 0.01 and gains[1] > -0.001

    def test_the_papers_options_are_in_the_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            cli.main(["train", "--help"])
        text = " ".join(capsys.readouterr().out.split())
        shown = re.search(r"--lag 1 .*--weight-decay 0(?= )", text)
        assert shown is not None
        found = cli.parse(TrainOptions, ["d", "--out", "o", *shown[0].split()], "train")
        assert {name: getattr(found, name) for name in PAPERS} == PAPERS
        assert found.epochs <= PATIENCE  # no early end

    def test_advice(self, data: Path) -> None:
        def history(best: int, last: int) -> list[dict[str, Any]]:
            return [{"epoch": i, "best": int(i == best), "val_log_loss": 0.3} for i in range(last + 1)]

        settings = options(data, Path("o"))
        assert "the hidden state added nothing" in str(advice_on(history(0, 3), settings))
        assert "try --epochs 8" in str(advice_on(history(4, 4), settings))
        assert advice_on(history(2, 4), settings) is None
        # A start that is no regression says nothing.
        assert advice_on(history(0, 3), options(data, Path("o"), features=["none"])) is None
        assert advice_on([{"epoch": 4, "best": 1}], settings) is None  # no validation rows


def refused(*arguments: str | Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that must fail with status 2."""
    assert cli.main(["train", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("vllm-specdecpp train: ")
    assert captured.err.count("\n") == 1
    return captured.err


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--layers", "-1"], "--layers -1: input should be greater than or equal to 0"),
            (["--features", "top1"], "--features top1: input should be 'top1_prob'"),
            (["--features", "margin", "margin"], "features=margin,margin names one twice"),
            (["--features", "none", "margin"], "features=none goes alone"),
            (["--lag", "1", "--features", "margin"], "features=margin with lag=1: such a head reads the hidden state"),
            (["--lag", "2"], "--lag 2: input should be 0 or 1"),
            (["--w-rej", "0"], "--w-rej 0: input should be greater than 0"),
            (["--dropout", "1"], "--dropout 1: input should be less than 1"),
            (["--validation", "1"], "--validation 1: input should be less than 1"),
            (["--layer", "1"], "unknown option --layer; did you mean --layers?"),
        ],
    )
    def test_options(
        self, data: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert message in refused(data, "--out", tmp_path / "head", *arguments, capsys=capsys)
        assert not (tmp_path / "head").exists()

    def test_out_holds_a_head(self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "head"
        AcceptanceHead(HIDDEN).save_pretrained(out)
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        text = refused(data, "--out", out, capsys=capsys)
        assert "holds config.json, model.safetensors already; add --force to replace them" in text
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        assert cli.main(["train", str(data), "--out", str(out), "--epochs", "1", "--force"]) == 0
        assert (out / "model.safetensors").read_bytes() != before["model.safetensors"]

    def test_out_is_a_file(self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "head").write_text("mine")
        assert "is a file; name a folder" in refused(data, "--out", tmp_path / "head", capsys=capsys)
        assert (tmp_path / "head").read_text() == "mine"

    @pytest.mark.parametrize(("all_of", "missing"), [(0, "accepted"), (NUM_CANDIDATES, "rejected")])
    def test_nothing_to_tell_apart(
        self, tmp_path: Path, all_of: int, missing: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = make_dataset(tmp_path / "data", all_of=all_of)
        text = refused(folder, "--out", tmp_path / "head", "--lag", "0", capsys=capsys)
        assert f"no {missing} candidate among" in text and str(folder) in text
        assert not (tmp_path / "head").exists()

    def test_mixed_pairs(self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        other = make_dataset(tmp_path / "other", units=1, draft="org/tiny")
        text = refused(data, other, "--out", tmp_path / "head", capsys=capsys)
        assert "org/tiny" in text and "org/small" in text

    def test_no_dataset(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "is no dataset" in refused(tmp_path, "--out", tmp_path / "head", capsys=capsys)

    def test_a_broken_shard_keeps_the_old_head(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder, out = make_dataset(tmp_path / "data"), tmp_path / "head"
        run(options(folder, out, epochs=1))
        capsys.readouterr()
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        shard = folder / "shards" / "00002.safetensors"
        shard.write_bytes(shard.read_bytes()[:1000])
        assert "00002.safetensors is truncated" in refused(folder, "--out", out, "--force", capsys=capsys)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
