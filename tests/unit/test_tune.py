# SPDX-License-Identifier: Apache-2.0
"""The command ``tune`` on datasets in files: what it chooses, writes and refuses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.calibrate_files import write_provenance
from tests.dataset_files import make_manifest
from tests.recorded_process import HIDDEN, Process, as_shard, record
from vllm_specdecpp.costs.file import CostFile
from vllm_specdecpp.costs.model import CostModel
from vllm_specdecpp.data.manifest import Manifest
from vllm_specdecpp.data.prompts import split_by_id
from vllm_specdecpp.data.shard_file import write_shard
from vllm_specdecpp.data.shards import create_dataset
from vllm_specdecpp.head.model import AcceptanceHead
from vllm_specdecpp.training.collect.responses import write_responses
from vllm_specdecpp.training.replay import tune
from vllm_specdecpp.training.replay.chains import load_chains
from vllm_specdecpp.training.replay.cost_aware import cost_aware_lengths
from vllm_specdecpp.training.replay.replay import RecordedEstimator, oracle_lengths, survivals, threshold_lengths, walk
from vllm_specdecpp.training.replay.tune import TuneOptions, choose, run
from vllm_specdecpp.training.replay.tune_report import Choice, markdown, table_rows, warnings

CURVES = {
    "first": {1: 0.05}, "step": {1: 0.044}, "verify": {1: 0.19, 2: 0.20, 9: 0.26}, "read": {2: 0.04}
}  # fmt: skip
COSTS = CostModel(**CURVES, max_reqs=1, max_tokens=64)
MANIFEST = make_manifest(hidden_size=HIDDEN, num_candidates=16, prompts_digest="train")


def write_dataset(folder: Path, *, seed: int, prefix: str, manifest: Manifest = MANIFEST, num_units: int = 2) -> Path:
    """Eight prompts of two sets in two units; set "b" comes second."""
    dataset = create_dataset(folder, manifest, force=False)
    for unit in range(num_units):
        processes = [Process(90, 0.75, seed + 10 * unit + i) for i in range(4)]
        shard = as_shard(
            record(processes, manifest.num_candidates, sets=("a", "b"), empty_rounds=False), f"{prefix}{unit}"
        )
        write_shard(dataset.shard_path(unit), shard, manifest)
    return folder


def write_head(folder: Path, **metadata: Any) -> Path:
    """A head that reads the confidence that the recorded states hold, roughly."""
    torch.manual_seed(0)
    head = AcceptanceHead(HIDDEN, 0)
    with torch.no_grad():
        head.output.weight.zero_()
        head.output.weight[1, 0] = 1.0
        head.output.bias.copy_(torch.tensor([-0.5, 0.5]))
    head.metadata = {"draft": "org/draft", **metadata}
    head.save_pretrained(folder)
    return folder


def write_answers(folder: Path, texts: dict[str, list[int]], name: str) -> None:
    """Responses to some prompts (id → token ids) of a set."""
    rows = [{"id": i, "set": name, "prompt_token_ids": ids, "token_ids": [1]} for i, ids in texts.items()]
    write_responses(folder, 0, rows)


class Files:
    """A folder with all that tune reads."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.train = write_dataset(root / "train", seed=0, prefix="t")
        self.held_out = write_dataset(
            root / "held-out", seed=500, prefix="e", manifest=replace(MANIFEST, prompts_digest="held out")
        )
        self.head = write_head(root / "head")
        file = CostFile(root, {"device": "a machine"})
        file.save(CURVES)
        self.costs = file.path
        self.out = root / "out"

    def options(self, **changes: Any) -> TuneOptions:
        values: dict[str, Any] = {
            "head": self.head, "data": [self.train], "evaluate": [self.held_out], "costs": self.costs, "out": self.out,
        }  # fmt: skip
        return TuneOptions(**(values | changes))

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / "rows.jsonl").read_text().splitlines()]

    def config(self) -> dict[str, Any]:
        return json.loads((self.head / "config.json").read_text())


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    """Of which few settings are tried, and the prompts resampled seldom."""
    monkeypatch.setattr(tune, "THRESHOLDS", (0.2, 0.5, 0.8))
    monkeypatch.setattr(tune, "BOUNDS", (4, 20))
    monkeypatch.setattr(tune, "RESAMPLES", 50)
    return Files(tmp_path)


def chosen(rows: Sequence[dict[str, Any]], name: str, policy: str) -> dict[str, Any]:
    (row,) = [row for row in rows if (row["set"], row["policy"], row["chosen"]) == (name, policy, True)]
    return row


class TestRun:
    def test_from_files_to_a_rule(self, files: Files, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(files.options()) == 0
        rows = files.rows()
        assert {row["set"] for row in rows} == {"a", "b", "all"}
        assert sorted(path.name for path in files.out.iterdir()) == ["pareto.png", "rows.jsonl", "tune.md"]
        assert (files.out / "pareto.png").read_bytes()[:4] == b"\x89PNG"
        rule = files.config()["rule"]
        head_row = chosen(rows, "all", "threshold")
        assert (rule["threshold"], rule["num_speculative_tokens"]) == (
            head_row["threshold"], head_row["num_speculative_tokens"],
        )  # fmt: skip
        assert rule["rule"] == "threshold"
        assert rule["tuned_on"] == "8 prompts of train, temperature 0.0 on a machine"
        AcceptanceHead.from_pretrained(files.head)  # and the config is still a head's
        table = (files.out / "tune.md").read_text()
        assert f"threshold h={rule['threshold']:g} K≤{rule['num_speculative_tokens']}" in table
        assert table in capsys.readouterr().out

    def test_chooses_on_the_data_and_reports_on_the_evaluation(self, files: Files) -> None:
        """The rule is the best of the data, whatever it does on the evaluation; the rows are the evaluation's."""
        run(files.options())
        head = AcceptanceHead.from_pretrained(files.head)
        for name, folder in (("data", files.train), ("judged", files.held_out)):
            chains = load_chains([folder], head)
            rates = {}
            for bound in (4, 16):
                for h in (0.2, 0.5, 0.8):
                    survival = survivals(chains, RecordedEstimator("threshold", chains, head), bound)
                    found = walk(chains, threshold_lengths(chains, survival, h, bound), COSTS)
                    rates[h, bound] = found.tokens_per_second()
            best = max(rates, key=lambda key: rates[key])
            row = chosen(files.rows(), "all", "threshold")
            key = (row["threshold"], row["num_speculative_tokens"])
            if name == "data":
                assert key == best and len(set(rates.values())) > 1
            else:
                assert row["tokens_per_second"] == pytest.approx(rates[key])
                assert row["prompts"] == 8 and row["tokens"] == chains.num_starts

    def test_rows_agree_with_each_other(self, files: Files) -> None:
        run(files.options())
        rows = files.rows()
        chains = load_chains([files.held_out])
        for name in ("a", "b", "all"):
            members = [row for row in rows if row["set"] == name]
            fixed = [row for row in members if row["policy"] == "fixed"]
            (oracle,) = [row for row in members if row["policy"] == "oracle"]
            assert [row["num_speculative_tokens"] for row in fixed] == list(range(1, 17))  # whatever the bounds are
            base = chosen(rows, name, "fixed")
            assert base["tokens_per_second"] == max(row["tokens_per_second"] for row in fixed)
            best = walk(chains, oracle_lengths(chains, COSTS, 16), COSTS)
            selected = chains.in_sets(None if name == "all" else [name])
            assert oracle["tokens_per_second"] == pytest.approx(best.tokens_per_second(selected))
            assert oracle["gap_closed"] == pytest.approx(1) and base["gap_closed"] == pytest.approx(0)
            for row in members:
                assert row["tokens"] == base["tokens"]
                assert row["best_fixed_k"] == base["num_speculative_tokens"]
                assert row["over_off"] == pytest.approx(row["tokens_per_second"] * COSTS.verify.at(1))
                assert row["over_best_fixed"] == pytest.approx(row["tokens_per_second"] / base["tokens_per_second"])
                assert row["tokens_per_second_low"] <= row["tokens_per_second"] <= row["tokens_per_second_high"]
                assert row["over_best_fixed_low"] <= row["over_best_fixed_high"]
            # Paired by prompt: the best fixed length over itself has no spread.
            assert base["over_best_fixed_low"] == base["over_best_fixed_high"] == 1

    def test_without_a_head(self, files: Files) -> None:
        before = files.config()
        run(files.options(head=None))
        assert {row["policy"] for row in files.rows()} == {"fixed", "confidence", "entropy", "cost_aware", "oracle"}
        assert files.config() == before

    def test_no_write_leaves_the_head(self, files: Files) -> None:
        before = files.config()
        run(files.options(write=False))
        assert files.config() == before

    def test_without_an_evaluation_it_says_so(self, files: Files) -> None:
        run(files.options(evaluate=[]))
        assert "the same ones, which favours the rules" in (files.out / "tune.md").read_text()

    def test_all_of_the_data_is_tuned_on_but_what_the_head_saw(self, files: Files) -> None:
        """Of the training data only the prompts held out in training count."""
        write_provenance(files.head, load_chains([files.train]).prompts, 0.5, 3)
        run(files.options())
        ids = [p[0] for p in load_chains([files.train]).prompts]
        num = sum(split_by_id(i, 0.5, 3) for i in ids)
        assert 0 < num < 8
        assert files.config()["rule"]["tuned_on"].startswith(f"{num} prompts of train")
        table = (files.out / "tune.md").read_text()
        others = "confidence, entropy: on all 8"
        assert f"Tuned on {num} prompts that the head was not trained on ({others}); judged on 8 others" in table
        assert f"Warning: thresholds that were chosen on {num} prompts are uncertain" in table
        # A rule that reads no head is tuned as it is without one.
        with_head = {row["policy"]: row["threshold"] for row in files.rows() if row["chosen"]}
        run(files.options(head=None, out=files.root / "without"))
        files.out = files.root / "without"
        without = {row["policy"]: row["threshold"] for row in files.rows() if row["chosen"]}
        assert without == {name: with_head[name] for name in ("fixed", "confidence", "entropy")}

    def test_the_default_rule_is_reported(self, files: Files) -> None:
        run(files.options())
        head = AcceptanceHead.from_pretrained(files.head)
        chains = load_chains([files.held_out], head)
        for policy, read in (("cost_aware", None), ("cost_aware with the head", head)):
            (row,) = [row for row in files.rows() if (row["set"], row["policy"]) == ("all", policy)]
            served = load_chains([files.train], head)
            found = walk(chains, cost_aware_lengths(chains, COSTS, read, 16, served), COSTS)
            assert row["tokens_per_second"] == pytest.approx(found.tokens_per_second())
            assert f"| all | {policy} | {row['tokens_per_second']:.2f} |" in (files.out / "tune.md").read_text()

    def test_what_the_head_takes_is_charged_to_it(self, files: Files) -> None:
        run(files.options())
        before = files.rows()
        run(files.options(head_ms=20.0, force=True))
        for policy in ("threshold", "confidence", "cost_aware", "cost_aware with the head"):
            with_it, without = (
                max(r["tokens_per_second"] for r in rows if (r["set"], r["policy"]) == ("all", policy))
                for rows in (files.rows(), before)
            )
            assert (with_it < 0.95 * without) is (policy in ("threshold", "cost_aware with the head"))
            assert with_it <= without
        (row,) = [r for r in files.rows() if (r["set"], r["policy"]) == ("all", "cost_aware with the head")]
        (plain,) = [r for r in files.rows() if (r["set"], r["policy"]) == ("all", "cost_aware")]
        assert row["over_cost_aware"] == pytest.approx(row["tokens_per_second"] / plain["tokens_per_second"])
        assert row["over_cost_aware_low"] < row["over_cost_aware"] < row["over_cost_aware_high"] and row["prompts"] == 8
        assert (plain["over_cost_aware_low"], plain["over_cost_aware_high"]) == (1.0, 1.0)
        assert "Too few held-out prompts to say whether a head pays" in (files.out / "tune.md").read_text()


class TestRefusals:
    """Each is one line that names the option and the mend, and nothing is written."""

    def refused(self, files: Files, message: str, **changes: Any) -> None:
        before = (files.head / "config.json").read_bytes()
        with pytest.raises(ValueError, match="^specdecpp: ") as error:
            run(files.options(**changes))
        assert message in str(error.value) and "\n" not in str(error.value)
        assert (files.head / "config.json").read_bytes() == before
        assert not (files.out / "tune.md").exists()

    def test_evaluation_among_the_data(self, files: Files) -> None:
        again = write_dataset(files.root / "again", seed=7, prefix="t")
        self.refused(files, "again shares 8 prompts with --data (e.g. 't0p0' of 'a')", evaluate=[again])
        self.refused(files, "given twice", evaluate=[files.train])

    def test_evaluation_has_the_datas_texts_under_other_ids(self, files: Files) -> None:
        write_answers(files.train, {"t0p1": [5, 6], "t1p2": [7]}, "a")
        write_answers(files.held_out, {"e0p0": [7], "e1p3": [5, 6, 7]}, "a")
        self.refused(files, "shares 1 prompts with --data (e.g. 'e0p0' of 'a', there 't1p2' of 'a')")
        write_answers(files.held_out, {"e0p0": [6, 5], "e1p3": [5, 6, 7]}, "a")
        run(files.options())

    def test_evaluation_that_the_head_was_trained_on(self, files: Files) -> None:
        write_provenance(files.head, load_chains([files.held_out]).prompts)
        self.refused(files, "held-out shares 8 prompts with what the head was trained on")

    def test_unreadable_provenance(self, files: Files) -> None:
        (files.head / "provenance.json").write_text("{}")
        self.refused(files, "does not say what the head was trained on")

    def test_nothing_is_left_of_the_training_data(self, files: Files) -> None:
        write_provenance(files.head, load_chains([files.train]).prompts, 0.0)
        self.refused(files, "no recorded rounds of prompts that the head was not trained on")

    def test_results_are_there(self, files: Files) -> None:
        files.out.mkdir()
        (files.out / "rows.jsonl").write_text("mine")
        self.refused(files, "holds rows.jsonl")
        assert (files.out / "rows.jsonl").read_text() == "mine"
        run(files.options(force=True))
        assert len(files.rows()) > 10

    def test_out_is_a_file(self, files: Files) -> None:
        files.out.write_text("mine")
        self.refused(files, "is a file")

    def test_head_has_a_rule(self, files: Files) -> None:
        run(files.options(out=files.root / "first"))
        self.refused(files, "has a tuned rule already")
        run(files.options(write=False, out=files.root / "second"))
        run(files.options(force=True, out=files.root / "third"))

    def test_head_of_another_draft(self, files: Files) -> None:
        self.refused(files, "org/other", head=write_head(files.root / "other", draft="org/other"))

    def test_head_of_another_target(self, files: Files) -> None:
        head = write_head(files.root / "other", target="org/other")
        self.refused(files, "was trained for the target 'org/other', but the data is of", head=head)

    def test_what_is_not_there(self, files: Files) -> None:
        self.refused(files, "is no folder", head=files.root / "nowhere")
        self.refused(files, "cannot be read", costs=files.root / "none.json")

    def test_mixed_pairs(self, files: Files) -> None:
        other = write_dataset(files.root / "other", seed=9, prefix="o", manifest=replace(MANIFEST, draft="org/else"))
        self.refused(files, "org/else", data=[files.train, other])

    def test_damaged_shard(self, files: Files) -> None:
        path = files.train / "shards" / "00001.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        self.refused(files, "00001.safetensors")

    def test_no_shards(self, files: Files) -> None:
        create_dataset(files.root / "none", MANIFEST, force=False)
        self.refused(files, "no recorded rounds in", data=[files.root / "none"])


class TestReport:
    def rows(self, files: Files, costs: CostModel = COSTS, max_length: int = 16) -> tuple[list[dict[str, Any]], Any]:
        chains = load_chains([files.train])
        choice = choose(chains, costs, "confidence", None, [0.9], [max_length])
        survival = survivals(chains, RecordedEstimator("confidence", chains, None), max_length)
        walks = {
            Choice("fixed", 0.0, 3): walk(chains, threshold_lengths(chains, survival, 0.5, 3), costs),
            choice: walk(chains, threshold_lengths(chains, survival, 0.9, max_length), costs),
            Choice("oracle", 0.0, max_length): walk(chains, oracle_lengths(chains, costs, max_length), costs),
        }
        rows = table_rows("all", walks, chains.in_sets(None), {"confidence": choice}, costs, 20, 0)
        return rows, (chains, choice)

    def test_doubts(self, files: Files) -> None:
        rows, _ = self.rows(files)
        (found,) = warnings(rows, COSTS)
        assert "costs were measured up to 8 candidates and extrapolated to 16" in found
        assert not warnings([row | {"cut_rate": 0.02} for row in rows], CostModel({1: 1}, {1: 1}, {1: 1, 17: 2}))

    def test_outrun_records_are_warned_of(self, files: Files) -> None:
        rows, (chains, choice) = self.rows(files)
        rows = [row | {"cut_rate": 0.05 if row["policy"] == "confidence" else 0.0} for row in rows]
        assert "Warning: 5.0% of the rounds of confidence h=0.9" in warnings(rows, COSTS)[0]
        assert "Warning: 5.0%" in markdown(rows, COSTS, "m", {"confidence": chains}, chains)

    def test_bootstrap_is_reproducible_and_over_prompts(self, files: Files) -> None:
        first, second = (self.rows(files)[0] for _ in range(2))
        assert first == second
        assert first[1]["tokens_per_second_low"] < first[1]["tokens_per_second_high"]
