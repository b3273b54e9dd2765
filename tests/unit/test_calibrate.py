# SPDX-License-Identifier: Apache-2.0
"""The command ``calibrate`` on planted datasets: which prompts it uses, what it finds, what it writes and refuses."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.calibrate_files import HIDDEN, W_REJ, K, ids, make_dataset, make_head, write_provenance
from vllm_specdecpp import cli
from vllm_specdecpp.data.prompts import PromptName, split_by_id
from vllm_specdecpp.data.shard_file import write_shard
from vllm_specdecpp.head.files import Calibration
from vllm_specdecpp.head.model import AcceptanceHead
from vllm_specdecpp.training.fit import calibrate
from vllm_specdecpp.training.fit.calibrate import CalibrateOptions, run
from vllm_specdecpp.training.fit.calibration_report import verdict

ESTIMATORS = ["head", "head_uncalibrated", "logit_features_calibrated", "confidence", "confidence_calibrated"]


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "RESAMPLES", 40)


def rows_in(folder: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "rows.jsonl").read_text().splitlines()]


@pytest.fixture
def fit(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "fit", ids("fit"))


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "held_out", ids("eval", 60), seed=1)


@pytest.fixture
def head(tmp_path: Path) -> Path:
    return make_head(tmp_path / "head")


def names(prefix: str, num: int = 30) -> list[PromptName]:
    """Of :func:`make_dataset`'s prompts."""
    return [(each, "ab"[i % 2]) for i, each in enumerate(ids(prefix, num))]


def options(head: Path, fit: Path | list[Path], *evaluate: Path, **more: Any) -> CalibrateOptions:
    return CalibrateOptions(head=head, fit=fit if isinstance(fit, list) else [fit], evaluate=list(evaluate), **more)


@pytest.mark.parametrize("lag", [0, 1])
def test_w_rej_is_undone_and_the_head_judged(tmp_path: Path, lag: int) -> None:
    head = make_head(tmp_path / "head", lag=lag)
    fit = make_dataset(tmp_path / "fit", ids("fit"), lag=lag, rounds=200)
    # For lag 1 the last state of a round is read by nobody: fewer rows.
    held_out = make_dataset(tmp_path / "held_out", ids("eval", 90), lag=lag, rounds=200, seed=1)
    before = (head / "config.json").read_bytes()
    assert run(options(head, fit, held_out)) == 0

    calibration = AcceptanceHead.from_pretrained(head).calibration
    assert calibration is not None
    assert calibration.slope == pytest.approx(1, abs=0.15)
    assert calibration.intercepts == pytest.approx([math.log(W_REJ)] * (K - lag), abs=0.35)
    assert "30 prompts of fit" in str(calibration.fitted_on)
    assert (head / "config.json.before").read_bytes() == before

    rows = {(row["set"], row["estimator"]): row for row in rows_in(head / "calibration")}
    assert list(rows) == [(name, estimator) for name in ("a", "b", "all") for estimator in ESTIMATORS]
    ours = rows["all", "head"]
    assert ours["ece"] < 0.02 < 0.2 < rows["all", "head_uncalibrated"]["ece"]
    assert ours["auc"] == pytest.approx(rows["all", "head_uncalibrated"]["auc"], abs=0.01)
    assert ours["auc_low"] <= ours["auc"] <= ours["auc_high"] and ours["log_loss_low"] < ours["log_loss_high"]
    assert ours["lag"] == lag and ours["prompts"] == 90 and "fit" in ours["fitted_on"]
    assert ours["num"] == rows["a", "head"]["num"] + rows["b", "head"]["num"]
    assert 0 < ours["accept_rate"] < 1
    for other in ("confidence", "logit_features_calibrated"):
        assert rows["all", other]["log_loss_over_head_low"] > 0  # the head alone knows h without noise
        assert rows["all", other]["auc_over_head_high"] < 0
    # The noise makes the raw confidence overconfident; the fitted calibration cures that.
    assert rows["all", "confidence_calibrated"]["ece"] < rows["all", "confidence"]["ece"]
    table = (head / "calibration" / "calibrate.md").read_text()
    assert "draft → target" in table and str(tmp_path) not in table
    assert table.count("| logit features calibrated |") == 3
    assert "By log-loss on all, the head is **better than** the calibrated top-1 probability" in table
    assert "**better than** a logistic regression on the draft's scalars" in table
    by_chance = rows["all", "head"]["ece_by_chance"]
    assert 0 < by_chance < 0.03 and f"({by_chance:.3f}) | - |" in table
    assert "ece_by_chance" not in rows["all", "confidence"]


def test_the_verdict_follows_from_the_interval() -> None:
    def said(low: float, high: float) -> str:
        row = {"set": "all", "log_loss_over_head_low": low, "log_loss_over_head_high": high}
        lines = verdict([{**row, "estimator": name} for name in ("head", "confidence", "confidence_calibrated")])
        assert len(lines) == 1
        return lines[0]

    assert "**better than**" in said(0.001, 0.002) and "**worse than**" in said(-0.002, -0.001)
    assert "**not told apart from**" in said(-0.001, 0.001)


def test_how_a_calibration_is_said() -> None:
    found = Calibration(slope=1.0, intercepts=[-0.0002, 0.0001])
    assert found.shown() == "slope 1.000, intercept 0.000 at every position"
    found = Calibration(slope=1.2, intercepts=[-0.1, -0.0001])
    assert found.shown() == "slope 1.200, intercepts by position -0.100, 0.000"


def test_the_engines_probability_is_the_calibrated_one(head: Path, fit: Path) -> None:
    run(options(head, fit))
    loaded = AcceptanceHead.from_pretrained(head)
    assert loaded.calibration is not None
    hidden = torch.randn(50, HIDDEN, generator=torch.Generator().manual_seed(3))
    truth = (1 + 1.5 * hidden[:, 0]).sigmoid()
    assert (loaded.probability(hidden, position=2) - truth).abs().max() < 0.06


def test_of_the_training_data_only_validation_prompts_are_used(tmp_path: Path, head: Path) -> None:
    def seen(prompt_id: str) -> bool:
        return not split_by_id(prompt_id, 0.3, 5)

    # What the head was trained on looks far better than what it was not: log-odds + 5.
    train = make_dataset(tmp_path / "train", ids("train", 80), shift_of=lambda each: 5.0 if seen(each) else 0.0)
    write_provenance(head, names("train", 80))
    run(options(head, train))
    found = AcceptanceHead.from_pretrained(head).calibration
    assert found is not None
    num = sum(not seen(each) for each in ids("train", 80))
    assert 0 < num < 40 and f"{num} prompts of train" in str(found.fitted_on)
    assert found.intercepts == pytest.approx([math.log(W_REJ)] * K, abs=0.4)

    # The same prompts collected anew are training prompts too; other prompts all count.
    again = make_dataset(tmp_path / "again", ids("train", 80), seed=7, shift_of=lambda each: 5.0 if seen(each) else 0.0)
    other = make_dataset(tmp_path / "other", ids("other", 10))
    run(options(head, [again, other], force=True))
    found = AcceptanceHead.from_pretrained(head).calibration
    assert found is not None and f"{num + 10} prompts of again, other" in str(found.fitted_on)


def test_evaluation_on_prompts_of_the_training_is_refused(
    tmp_path: Path, head: Path, fit: Path, held_out: Path
) -> None:
    train = make_dataset(tmp_path / "train", ids("train"))
    write_provenance(head, names("train")[:20])
    with pytest.raises(ValueError, match="evaluate=.*train shares 20 prompts with what the head was trained on"):
        run(options(head, fit, held_out, train))
    mixed = make_dataset(tmp_path / "mixed", [*ids("new"), "train-24"])
    with pytest.raises(ValueError, match=r"mixed shares 1 prompts with --fit \(e\.g\. 'train-24' of 'a'\)"):
        run(options(head, [train, fit], mixed))
    assert AcceptanceHead.from_pretrained(head).calibration is None and not (head / "config.json.before").exists()


def test_a_prompt_of_the_same_id_in_another_set_is_another_one(tmp_path: Path, head: Path, fit: Path) -> None:
    other = make_dataset(tmp_path / "other", ids("fit"), sets=("c",), seed=2)
    assert run(options(head, fit, other)) == 0
    assert {row["set"] for row in rows_in(head / "calibration")} == {"c"}


def test_a_head_trained_without_validation_needs_other_data(tmp_path: Path, head: Path, fit: Path) -> None:
    train = make_dataset(tmp_path / "train", ids("train"))
    write_provenance(head, names("train"), validation=0.0)
    with pytest.raises(ValueError, match=r"trained on all of its prompts.*fit on another dataset"):
        run(options(head, train))
    assert run(options(head, fit)) == 0


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"prompts": {"fitted": []}}', '{"prompts": {"fitted": 3}}'])
def test_a_damaged_provenance_is_named(head: Path, fit: Path, content: str) -> None:
    (head / "provenance.json").write_text(content)
    with pytest.raises(ValueError, match=r"provenance\.json does not say what the head was trained on") as error:
        run(options(head, fit))
    assert "\n" not in str(error.value)


def test_what_train_writes_is_understood(tmp_path: Path) -> None:
    train_module = pytest.importorskip("vllm_specdecpp.training.fit.train")
    data = make_dataset(tmp_path / "train", ids("train", 60))
    out = tmp_path / "trained"
    train_options = train_module.TrainOptions(
        data=[data], out=out, lag=0, layers=0, epochs=2, validation=0.3, w_rej=6.0
    )
    assert train_module.run(train_options) == 0
    held_out = make_dataset(tmp_path / "held_out", ids("eval", 60), seed=1)
    assert run(options(out, data, held_out)) == 0
    rows = {(row["set"], row["estimator"]): row for row in rows_in(out / "calibration")}
    assert rows["all", "head"]["ece"] < 0.03 < rows["all", "head_uncalibrated"]["ece"]
    with pytest.raises(ValueError, match="shares 60 prompts with what the head was trained on"):
        run(options(out, held_out, data, force=True))


def test_nothing_is_replaced_without_force(head: Path, fit: Path, held_out: Path) -> None:
    original = (head / "config.json").read_bytes()
    run(options(head, fit, held_out))
    rows, config = (head / "calibration" / "rows.jsonl").read_bytes(), (head / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"holds rows\.jsonl, calibrate\.md, reliability\.png already; add --force"):
        run(options(head, fit, held_out))
    with pytest.raises(ValueError, match="is calibrated already"):
        run(options(head, fit))
    assert (head / "config.json").read_bytes() == config
    run(options(head, fit, held_out, force=True))
    # The raw score is calibrated, not the calibrated one once more; and the first original is kept.
    assert (head / "calibration" / "rows.jsonl").read_bytes() == rows and (head / "config.json").read_bytes() == config
    assert (head / "config.json.before").read_bytes() == original


def test_a_set_of_accepted_candidates_only_has_no_auc(tmp_path: Path, head: Path, fit: Path) -> None:
    easy = make_dataset(tmp_path / "easy", ids("easy", 2), sets=("easy",), rounds=5, shift_of=lambda each: 50.0)
    hard = make_dataset(tmp_path / "hard", ids("hard", 5), sets=("hard",))
    run(options(head, fit, easy, hard))
    rows = {(row["set"], row["estimator"]): row for row in rows_in(head / "calibration")}
    row = rows["easy", "confidence"]
    assert row["auc"] is row["auc_low"] is row["auc_over_head"] is None and row["accept_rate"] == 1.0
    assert math.isfinite(row["log_loss"]) and rows["all", "head"]["auc"] is not None
    assert "| - |" in (head / "calibration" / "calibrate.md").read_text()


def test_another_folder_for_the_results(tmp_path: Path, head: Path, fit: Path, held_out: Path) -> None:
    run(options(head, fit, held_out, out=tmp_path / "results"))
    assert sorted(file.name for file in (tmp_path / "results").iterdir()) == [
        "calibrate.md",
        "reliability.png",
        "rows.jsonl",
    ]
    assert not (head / "calibration").exists()


def test_without_matplotlib_it_says_so_before_any_work(
    head: Path, fit: Path, held_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(calibrate, "load_rows", lambda *args, **kwargs: pytest.fail("worked before it complained"))
    with pytest.raises(ValueError, match="plots need matplotlib"):
        run(options(head, fit, held_out))


def test_a_score_that_is_no_number_leaves_the_head_as_it_was(tmp_path: Path, head: Path, fit: Path) -> None:
    bad = make_dataset(tmp_path / "bad", ids("bad", 4), shift_of=lambda each: 0.0)
    path = bad / "shards" / "00000.safetensors"
    from vllm_specdecpp.data.shard_file import read_shard
    from vllm_specdecpp.data.shards import open_dataset

    manifest = open_dataset(bad).manifest
    shard = read_shard(path, manifest)
    shard.hidden_states = shard.hidden_states.clone()
    shard.hidden_states[0] = math.nan
    write_shard(path, shard, manifest)
    config = (head / "config.json").read_bytes()
    with pytest.raises(ValueError, match="the head's score of 1 of .* rows is no finite number"):
        run(options(head, fit, bad))
    assert (head / "config.json").read_bytes() == config and not (head / "calibration").exists()


def test_wrong_heads_and_data_are_refused_in_one_line(tmp_path: Path, head: Path, fit: Path) -> None:
    foreign = make_dataset(tmp_path / "foreign", ids("foreign", 3), draft="org/other")
    wide = make_dataset(tmp_path / "wide", ids("wide", 3), hidden_size=16)
    retargeted = make_dataset(tmp_path / "retargeted", ids("retargeted", 3), target="org/elsewhere")
    (tmp_path / "file").touch()
    weighted = make_head(tmp_path / "weighted", w_rej="6")
    held_out = make_dataset(tmp_path / "held_out", ids("eval", 3))
    cases: list[tuple[CalibrateOptions, str]] = [
        (options(head, foreign), "trained for the draft 'org/draft', but the draft model is 'org/other'"),
        (options(head, wide), "hidden size 8, but the draft model has 16"),
        (options(head, retargeted), "trained for the target 'org/target', but the data is of 'org/elsewhere'"),
        (options(head, fit, foreign), "give datasets of one pair"),
        (options(head, fit, fit), "given twice"),
        (options(tmp_path / "none", fit), "is no folder; give the folder of a trained head"),
        (options(tmp_path / "file", fit), "is no folder"),
        (options(head, tmp_path / "none"), "is no dataset"),
        (options(weighted, fit), "w_rej='6' in the head's config must be a number above 0"),
        (options(head, fit, held_out, out=tmp_path / "file"), "is a file; name a folder"),
        (options(head, fit, out=tmp_path / "new"), "stays empty without --evaluate"),
    ]
    config = (head / "config.json").read_bytes()
    for given, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            run(given)
        assert str(error.value).startswith("specdecpp: ") and "\n" not in str(error.value), message
    assert (head / "config.json").read_bytes() == config and not (tmp_path / "new").exists()


def test_a_head_without_provenance_or_labels_takes_all_prompts(tmp_path: Path, fit: Path) -> None:
    released = make_head(tmp_path / "released", draft=None, target=None)
    assert run(options(released, fit)) == 0
    found = AcceptanceHead.from_pretrained(released).calibration
    assert found is not None and "30 prompts of fit" in str(found.fitted_on)


def test_a_tuned_rule_is_called_out_of_date(tmp_path: Path, fit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = make_head(tmp_path / "head", rule={"rule": "threshold", "threshold": 0.4, "num_speculative_tokens": 8})
    run(options(head, fit))
    assert "tune again" in capsys.readouterr().err
    assert json.loads((head / "config.json").read_text())["rule"]["threshold"] == 0.4


def test_from_the_command_line(
    tmp_path: Path, head: Path, fit: Path, held_out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["calibrate", str(head), "--fit", str(fit), "--evaluate", str(held_out)]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "| head uncalibrated |" in out and "slope" in out
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "add --force" in error
