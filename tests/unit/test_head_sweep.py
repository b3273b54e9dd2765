# SPDX-License-Identifier: Apache-2.0
"""The head sweep on small planted datasets: what is trained on what, what is compared, going on, and its refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.heads import report as head_sweep_report
from benchmarks.heads import sweep as head_sweep
from benchmarks.heads.sweep import Config, Data, HeadSweepOptions, grid, main, run, run_one, with_head
from vllm_specdecpp.data.dataset import LabelRows
from vllm_specdecpp.data.prompts import Prompt, digest, split_by_id
from vllm_specdecpp.data.shards import Manifest, RoundRecord, create_dataset, shard_from_rounds, write_shard
from vllm_specdecpp.training import statistics as metrics
from vllm_specdecpp.training.fit.estimates import Scored, score_rows
from vllm_specdecpp.training.fit.train import train_head

HIDDEN, K = 8, 3
QUICK = {"width": None, "lr": 3e-3, "epochs": 6, "dropout": 0.0, "weight_decay": 0.0, "batch_size": 64}


def make_data(folder: Path, ids: Sequence[str], seed: int) -> Path:
    """Candidates are accepted with log-odds 1 + 2 h; h is the first number of the hidden state of the pass before the
    draw, the second of the pass after it. The top-1 probability knows h but for noise."""
    generator = torch.Generator().manual_seed(seed)
    manifest = Manifest(
        target="org/large", draft="org/small", hidden_size=HIDDEN,
        source="on-policy", sampling={"temperature": 0.0}, num_candidates=K,
        prompts_digest=digest([Prompt(each, "", str(seed)) for each in ids]), num_prompts=len(ids),
        unit_size=len(ids), versions={},
    )  # fmt: skip
    records = []
    for prompt_id in ids:
        for at in range(90 // K):
            hidden = torch.randn(K + 1, HIDDEN, generator=generator)
            hidden[1:, 1] = hidden[:-1, 0]
            logit = 1 + 2 * hidden[:K, 0]
            accepted = torch.bernoulli(logit.sigmoid(), generator=generator).tolist()
            guess = (logit + 2 * torch.randn(K, generator=generator)).sigmoid()
            records.append(
                RoundRecord(
                    request_id=prompt_id, hidden_states=hidden[:K], token_ids=[1] * K, top1_prob=guess,
                    entropy=3 * (1 - guess), margin=guess * 4,
                    soft_label=torch.full((K,), math.nan), num_accepted=([*accepted, 0.0]).index(0.0),
                    num_verified=K, emitted=at, temperature=0.0,
                )
            )  # fmt: skip
    shard = shard_from_rounds(records, {i: {"id": i, "set": "ab"[int(i[1:]) % 2]} for i in ids})
    dataset = create_dataset(folder, manifest, force=False)
    write_shard(dataset.shard_path(0), shard, manifest)
    return folder


TRAIN = [f"t{i}" for i in range(40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sweep")
    make_data(path / "train", TRAIN, 0)
    make_data(path / "eval", [f"e{i}" for i in range(30)], 2)
    return path


def options(folder: Path, out: Path, **changes: Any) -> HeadSweepOptions:
    given: dict[str, Any] = {
        "train": [folder / "train"], "evaluate": [folder / "eval"], "out": out, "seeds": 1,
        "bootstrap": 20, "validation": 0.3, "centre": json.dumps(QUICK),
    }  # fmt: skip
    return HeadSweepOptions(**{**given, **changes})


class TestGrid:
    def test_one_factor_at_a_time(self) -> None:
        configs = grid(head_sweep.FACTORS, [0.5, 0.25, 1.0])
        assert configs[0] == Config("centre", "centre")
        names = [(config.factor, config.value) for config in configs]
        assert len(set(names)) == len(names)
        assert [config.share for config in configs if config.factor == "labels"] == [0.25, 0.5]
        assert {config.changes["layers"] for config in configs if config.factor == "depth"} == {0, 2, 3, 4}
        assert {config.changes["w_rej"] for config in configs if config.factor == "w_rej"} == {3.0, 6.0}
        recipes = [config for config in configs if config.factor == "recipe"]
        papers = next(config for config in recipes if config.value == "paper's")
        assert (papers.changes["layers"], papers.changes["w_rej"], papers.changes["lag"]) == (3, 6.0, 1)
        assert [config.factor for config in grid(["depth"], [0.5])] == ["centre"] + ["depth"] * 4


class TestData:
    def test_held_out_prompts_are_the_same_at_both_lags(self, folder: Path, tmp_path: Path) -> None:
        data = Data(options(folder, tmp_path / "x.jsonl"))
        for lag in (0, 1):
            split = data.split(lag, 3)
            fitted, held_out = ({part.prompts[i][0] for i in part.prompt.tolist()} for part in split)
            assert fitted | held_out == set(TRAIN) and held_out == {each for each in TRAIN if split_by_id(each, 0.3, 3)}

    def test_prompts_in_both(self, folder: Path, tmp_path: Path) -> None:
        mixed = make_data(tmp_path / "mixed", ["n1", "t4", "n2"], 10)
        with pytest.raises(ValueError, match=r"evaluate=.*mixed shares 1 prompts with --train \(e\.g\. 't4' of 'a'\)"):
            Data(options(folder, tmp_path / "x.jsonl", evaluate=[mixed]))


class TestRuns:
    def test_a_head_that_sees_what_the_logits_do_not(self, folder: Path, tmp_path: Path) -> None:
        chosen = options(folder, tmp_path / "x.jsonl")
        data = Data(chosen)
        row = run_one(Config("centre", "centre"), 0, data, chosen)
        whole = row["sets"]["all"]
        assert list(row["sets"]) == ["a", "b", "all"] and whole["prompts"] == 30
        assert whole["num"] == row["sets"]["a"]["num"] + row["sets"]["b"]["num"]
        assert whole["head"]["auc"] > whole["logit_features"]["auc"] + 0.02
        assert whole["head"]["log_loss_over_logit_features_high"] < 0
        assert whole["head"]["ece"] < 0.05 < whole["confidence"]["ece"]  # the planted noise makes it overconfident
        fitted, held_out = data.split(0, 0)
        assert (row["rows"], row["held_out_rows"]) == (len(fitted), len(held_out))

    def test_the_figures_are_those_of_the_metrics(self, folder: Path, tmp_path: Path) -> None:
        """The head's, computed here step by step; and one that was trained on nothing has the chance's AUC."""
        chosen = options(folder, tmp_path / "x.jsonl")
        data = Data(chosen)
        config = Config("w_rej", "6", {"w_rej": 6.0})
        row = run_one(config, 1, data, chosen)
        fitted, held_out = data.split(0, 1)
        settings = {**head_sweep.CENTRE, **QUICK, "w_rej": 6.0, "seed": 1}
        head, _ = train_head(fitted, held_out, head_sweep.TrainOptions(data=[Path("d")], out=Path("o"), **settings))
        scored = score_rows(head, data.rows("judged", 0))
        estimates = with_head(score_rows(head, held_out), math.log(6))
        for name in ("head", "head_uncalibrated"):
            p = estimates[name](scored)
            assert row["sets"]["all"][name]["auc"] == pytest.approx(metrics.auc(p, scored.rows.accepted), abs=1e-5)
            loss = metrics.log_loss(p, scored.rows.accepted)
            assert row["sets"]["all"][name]["log_loss"] == pytest.approx(loss, abs=1e-5)
        shifted = (scored.logit.double() + math.log(6)).sigmoid()
        assert torch.equal(estimates["head_uncalibrated"](scored), shifted)

    def test_a_share_of_the_labels(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Both the head and what it is compared with see the share, and the same held-out prompts."""
        seen: list[LabelRows] = []
        original = head_sweep.without_head

        def spy(rows: LabelRows) -> Any:
            seen.append(rows)
            return original(rows)

        monkeypatch.setattr(head_sweep, "without_head", spy)
        chosen = options(folder, tmp_path / "x.jsonl")
        data = Data(chosen)
        whole, part = (run_one(Config("labels", "s", share=share), 0, data, chosen) for share in (1.0, 0.25))
        assert 0.1 * whole["rows"] < part["rows"] <= 0.25 * whole["rows"]
        assert whole["held_out_rows"] == part["held_out_rows"]
        assert [len(rows) for rows in seen] == [row["rows"] + row["held_out_rows"] for row in (whole, part)]

    def test_the_estimates_without_a_head(self, folder: Path, tmp_path: Path) -> None:
        """They read every scalar."""
        rows = Data(options(folder, tmp_path / "x.jsonl")).rows("on-policy", 0)
        rows = replace(rows, scalars={**rows.scalars, "margin": rows.accepted * 0.8 + 0.1})
        p = head_sweep.without_head(rows)["logit_features"](Scored(rows, torch.zeros(len(rows))))
        assert metrics.auc(p, rows.accepted) > 0.99


def rows_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class TestReport:
    def command(self, folder: Path, out: Path, *more: str) -> list[str]:
        return [
            "--train", str(folder / "train"), "--evaluate", str(folder / "eval"),
            "--out", str(out), "--bootstrap", "10", "--validation", "0.3",
            "--centre", json.dumps({**QUICK, "epochs": 2}), *more,
        ]  # fmt: skip

    def test_files_and_going_on(self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "results" / "x.jsonl"
        short = self.command(folder, out, "--factors", "labels", "--shares", "0.5", "--seeds", "1")
        assert main([*short, "--minutes", "0.00001"]) == 0  # no time for any run
        assert "2 runs to go" in capsys.readouterr().out and not out.exists()
        assert main(short) == 0
        last = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert last["runs"] == 2 and last["out"] == "x.jsonl"
        raw = out.with_suffix(".raw.jsonl")
        before = raw.read_bytes()
        assert main(short) == 2
        assert "is finished; choose another name, or pass --force" in capsys.readouterr().err
        assert raw.read_bytes() == before

        page = out.with_suffix(".md")
        page.write_text(page.read_text().replace("<!-- notes -->\n", "<!-- notes -->\nBy hand: the head is fine."))
        longer = self.command(folder, out, "--factors", "labels", "lag", "--shares", "0.5", "--seeds", "2", "--force")
        assert main(longer) == 0
        assert raw.read_bytes().startswith(before)
        measured = [(row["factor"], row["value"], row["seed"]) for row in rows_in(raw) if "run" not in row]
        assert len(set(measured)) == len(measured) == 6 and measured[2] == ("lag", "1, hidden state alone", 0)
        text = page.read_text()
        assert "By hand: the head is fine." in text and text.count("<!-- notes -->") == 1
        assert text.count("\n| lag |") == 1 and text.startswith("# Acceptance heads for small → large\n")
        assert out.with_suffix(".png").stat().st_size > 10_000
        lines = rows_in(out)
        assert len(lines) == 3 * 3 and {line["seeds"] for line in lines} == {2}
        centre = next(line for line in lines if line["factor"] == "centre" and line["set"] == "all")
        values = [
            row["sets"]["all"]["head"]["log_loss"] for row in rows_in(raw) if row.get("factor") == "centre"
        ]  # fmt: skip
        assert centre["head"]["log_loss"] == pytest.approx(sum(values) / 2, abs=1e-5)
        assert (centre["head"]["log_loss_low"], centre["head"]["log_loss_high"]) == (min(values), max(values))

    def test_other_settings_are_not_mixed(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "x.jsonl"
        short = self.command(folder, out, "--factors", "labels", "--shares", "0.5", "--minutes", "0.00001")
        assert main(short) == 0
        capsys.readouterr()
        assert main([*short, "--bootstrap", "11"]) == 2
        assert "was measured with bootstrap=10, not 11" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (["--seeds", "0"], "--seeds: Input should be greater than or equal to 1"),
            (["--factors", "size"], "--factors: Input should be 'labels'"),
            (["--centre", "{"], "--centre is not JSON"),
            (["--centre", '{"layer": 1}'], "layer: Extra inputs are not permitted"),
            (["--out", "x.md"], "the name must end in .jsonl"),
            (["--seed", "1"], "unknown option --seed; did you mean --seeds?"),
        ],
    )
    def test_user_errors_are_one_line(
        self, folder: Path, tmp_path: Path, changes: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([*self.command(folder, tmp_path / "x.jsonl"), *changes]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert not list(tmp_path.iterdir())

    def test_the_verdict_follows_from_the_interval(self) -> None:
        def row(seed: int, share: float, head: float, low: float, high: float) -> dict[str, Any]:
            over = {"log_loss_over_logit_features": head - 0.3, "log_loss_over_logit_features_low": low,
                    "log_loss_over_logit_features_high": high, "auc_over_logit_features": 0.0,
                    "auc_over_logit_features_low": 0.0, "auc_over_logit_features_high": 0.0}  # fmt: skip
            plain = {"auc": 0.9, "log_loss": 0.3, "ece": 0.01}
            found: dict[str, Any] = {name: {**plain, **over} for name in head_sweep_report.ESTIMATORS}
            found |= {"head": {**plain, "log_loss": head, **over}, "num": 10, "prompts": 2, "accept_rate": 0.8}
            return {
                "factor": "centre" if share == 1 else "labels", "value": f"{share}", "share": share, "seed": seed,
                "lag": 0, "changes": {}, "num_parameters": 1, "rows": 100 * share,
                "best_epoch": 1, "seconds": 1.0, "sets": {"all": found},
            }  # fmt: skip

        for low, high, word in (
            (-0.03, -0.01, "better than"),
            (0.01, 0.03, "worse than"),
            (-0.1, 0.1, "not told apart"),
        ):
            said = head_sweep_report.verdict([row(0, 1.0, 0.28, low, high), row(1, 1.0, 0.26, low, high)])
            assert word in said[0] and "-0.0300" in said[0] and len(said) == 2
        rows = [row(seed, share, loss, 0, 0) for seed, (a, b) in enumerate([(0.4, 0.3), (0.35, 0.33)])
                for share, loss in ((0.5, a), (1.0, b), (0.25, 9.0))]  # fmt: skip
        found = head_sweep_report.gain(rows)
        assert found is not None and found["head"] == pytest.approx([0.1, 0.02]) and found["logit_features"] == [0, 0]


def test_without_matplotlib_it_says_so_before_any_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise ValueError("specdecpp: plots need matplotlib")

    monkeypatch.setattr(head_sweep.plots, "check_installed", missing)
    with pytest.raises(ValueError, match="matplotlib"):
        run(options(folder, tmp_path / "x.jsonl"), "command")
    assert not list(tmp_path.iterdir())
