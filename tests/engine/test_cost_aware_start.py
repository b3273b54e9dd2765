# SPDX-License-Identifier: Apache-2.0
"""The cost-aware rule in engines of its own: the law of what is sampled, and the costs kept between starts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests import engine_harness as harness
from tests.exact_law import p_value
from vllm_specdecpp.costs import file, timing
from vllm_specdecpp.costs.file import CostFile, read
from vllm_specdecpp.costs.widths import PASSES
from vllm_specdecpp.engine.v1 import timing as v1_timing


@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_sampled_output_follows_the_exact_law(tiny, law, method):
    prompt, length = [3, 5, 4, 7, 6], 4
    config = {
        "method": "specdecpp", "model": tiny.small_draft, "num_speculative_tokens": 5, "draft_sample_method": method,
        "trace_rounds": 100_000,
    }  # fmt: skip
    with harness.engine(tiny.small_target, config, **harness.SMALL | {"max_num_seqs": 64}) as llm:
        # Between the two: some requests go on, some leave a candidate out.
        harness.set_costs(llm, {"first": {1: 1e-3}, "step": {1: 1e-3}, "verify": {1: 10e-3, 64: 11e-3, 512: 16e-3}})
        samples = harness.first_tokens(llm, prompt, 2048, length, 1, n=64, temperature=1.0)
        rounds = harness.take_rounds(llm)
    assert len({len(r["candidates"]) for r in rounds}) >= 3 and 0.1 < harness.accepted_share(rounds) < 0.98
    assert p_value(samples, law(prompt, length, 1.0)) > 1e-4


def test_costs_and_what_was_learnt_are_kept_for_the_next_start(tiny, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    config = {"method": "specdecpp", "model": tiny.draft_rand, "num_speculative_tokens": 3}
    rows = [4, 4, 4, 4, 8, 8, 8, 8]
    monkeypatch.setattr(v1_timing, "cheapest_rows", lambda seconds: rows)
    with harness.engine(tiny.target, config) as llm:
        cost_aware = harness.proposer(llm).cost_aware
        assert harness.proposer(llm).rows == dict.fromkeys(PASSES, rows)
        while cost_aware._overheads is not None or cost_aware.rule.admission.records.known < 12:
            harness.generate(llm, harness.prompts(4))
        model = cost_aware.rule.costs
        for _ in range(40):
            model.verify.nudge(1, 0.3)
        learnt, records = model.points(lasting=True), cost_aware.rule.admission.records
        state = cost_aware.rule.state()
    (path,) = (tmp_path / "specdecpp").glob("costs-*.json")
    kept = json.loads(path.read_text())
    assert "draft_rand" in kept["setting"]["draft"] and kept["learnt"] == json.loads(json.dumps(state))

    assert kept["rows"] == dict.fromkeys(PASSES, rows)

    def measure(*args: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(timing, "measure", measure)
    assert "going on with what was learnt" not in caplog.text
    with harness.engine(tiny.target, config) as llm:
        proposer = harness.proposer(llm)
        rule, found = proposer.cost_aware.rule, proposer.cost_aware.rule.costs.points()
        assert proposer.rows == dict.fromkeys(PASSES, rows)
        assert "_determine_batch_execution_and_padding" in proposer.runner.__dict__  # the target's passes, too
    assert "going on with what was learnt" in caplog.text
    assert rule.admission.records.mean == pytest.approx(records.mean)
    assert rule.admission.records.known == pytest.approx(records.known, rel=0.05)  # a little older
    assert {n: list(c) for n, c in found.items()} == {n: list(c) for n, c in learnt.items()}
    assert all(found[name] == pytest.approx(learnt[name], rel=1e-6) for name in learnt)


@pytest.mark.parametrize("reach", ["damaged", "out of reach"])
def test_a_start_goes_on_without_the_costs_file(tiny, tmp_path, monkeypatch, reach):
    """A damaged one is made anew; one that nobody can read or replace is left alone."""
    warned: list[str] = []  # vLLM sets up its log anew when it is imported: no caplog
    monkeypatch.setattr(file.logger, "warning", lambda text, *args: warned.append(text % args))
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setattr(timing, "measure", lambda *args: {"first": {1: 1e-3}, "step": {1: 1e-3}, "verify": {1: 9e-3}})
    load, paths = CostFile.load, []

    def spoilt(self: CostFile) -> Any:
        paths.append(self.path)
        self.path.parent.mkdir(exist_ok=True)
        if reach == "damaged":
            self.path.write_text('{"format"')
        else:
            self.path.mkdir()
            (self.path / "mine").write_text("")
        return load(self)

    monkeypatch.setattr(CostFile, "load", spoilt)
    with harness.engine(tiny.target, {"method": "specdecpp", "model": tiny.draft_good}) as llm:
        while harness.proposer(llm).cost_aware._overheads is not None:
            assert harness.generate(llm, harness.prompts(4))
    (path,) = paths
    if reach == "damaged":
        assert "is damaged" in "".join(warned) and read(path).curves
    else:
        assert "cannot be read" in "".join(warned) and "cannot be written" in "".join(warned)
        assert [inside.name for inside in path.iterdir()] == ["mine"]
