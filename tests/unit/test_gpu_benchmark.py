# SPDX-License-Identifier: Apache-2.0
"""What of ``benchmarks.gpu`` a machine without a GPU can show."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import jobs, plots
from benchmarks.gpu.shapes import DRAFTS, VOCAB


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line():
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("specdecpp: ") and "GPU" in line


def test_results_are_never_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "no_gpu", lambda: None)
    (tmp_path / "results.json").write_text("{}")
    assert command.main(["--results", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("specdecpp: --results")
    assert (tmp_path / "results.json").read_text() == "{}"


def test_shapes_are_the_sizes_they_are_called():
    for name, shape in DRAFTS.items():
        attention = shape.hidden * (2 * shape.hidden + 2 * shape.kv_heads * shape.hidden // shape.heads)
        # Embeddings counted once: the small ones tie them.
        weights = shape.layers * (attention + 3 * shape.hidden * shape.intermediate) + VOCAB * shape.hidden
        assert weights == pytest.approx(float(name.removesuffix("B")) * 1e9, rel=0.3), name
        assert shape.hidden % shape.heads == 0 == shape.heads % shape.kv_heads


def test_jobs_cover_every_way_and_are_json(tmp_path):
    made = jobs.draft_round_jobs(tmp_path, ["0.5B", "7B"], [1, 64])
    ways = {"native", "if_nodes, rule scored"} | {
        way for mode in jobs.MODES for way in (mode, *(f"{mode}, {stop} of 20" for stop in jobs.STOPS))
    }
    assert {(job["draft"], job["way"]) for job in made} == {(d, way) for d in ("0.5B", "7B") for way in ways}
    assert json.loads((tmp_path / "target of 7B" / "config.json").read_text())["num_hidden_layers"] == 1
    for job in made:
        assert json.loads(json.dumps(job)) == job
        assert (job["mode"] is None) == (job["speculative_config"]["method"] == "draft_model")


@pytest.mark.parametrize(
    ("code", "timeout", "wanted"),
    [
        ("print('noise'); print('{\"rows\": [1]}')", 60, {"rows": [1]}),
        ("import sys; sys.exit('no memory')", 60, {"error": "no memory"}),
        ("import time; time.sleep(60)", 1, {"error": "no result within 1 s"}),
    ],
)
def test_a_job_that_fails_costs_its_own_row(monkeypatch, code, timeout, wanted):
    run = subprocess.run

    def instead(arguments, **options):
        return run([sys.executable, "-c", code], **options)

    monkeypatch.setattr(subprocess, "run", instead)
    job = {"draft": "1B", "way": "eager", "target": "t"}
    row = command.run_job(job, timeout)
    assert row == {"draft": "1B", "way": "eager", **wanted}


def test_plots_are_written_for_what_was_measured(tmp_path):
    pytest.importorskip("matplotlib")
    rows: list[dict[str, Any]] = [
        {"draft": "1B", "way": "eager", "rows": [{"batch": 1, "ms": 3.0}]},
        {"draft": "1B", "way": "if_nodes", "error": "no memory"},
        {"draft": "7B", "way": "eager", "error": "no memory"},
    ]
    assert plots.lines(rows, "1B") == {"eager": ([1], [3.0])}
    assert [path.name for path in plots.write(rows, tmp_path)] == ["draft-rounds-1B.png"]
    assert (tmp_path / "draft-rounds-1B.png").stat().st_size > 1000
