# SPDX-License-Identifier: Apache-2.0
"""Captured draft rounds decide as eager ones do. Needs a GPU (``python -m benchmarks.gpu``); none has run it yet."""

from __future__ import annotations

from typing import Any

import pytest

from tests import engine_harness as harness
from tests.v2 import harness as v2_harness
from tests.v2.cost_rounds import late_copies
from vllm_specdecpp.engine.v2 import graphs

pytestmark = pytest.mark.gpu
CURVES = {"first": {1: 2e-3}, "step": {1: 2e-3, 4: 3e-3}, "verify": {1: 10e-3, 8: 14e-3, 32: 30e-3}}
PROMPTS = harness.prompts(12, seed=40)
MODES = [graphs.EAGER, graphs.PER_PASS, graphs.IF_NODES]


@pytest.fixture(autouse=True)
def v2(monkeypatch):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")


def _rounds(tiny: Any, mode: str, monkeypatch: Any, dtype: str = "float32", **options: Any) -> list[Any]:
    config = {
        "method": "specdecpp", "model": tiny.draft_good, "head": tiny.head, "rule": "threshold", "threshold": 0.7,
        "num_speculative_tokens": 8, "trace_rounds": 100_000, **options,
    }  # fmt: skip
    monkeypatch.setattr(graphs, "choose_mode", lambda **_: (mode, "asked for by the test"))
    with harness.engine(tiny.target, config, enforce_eager=mode == graphs.EAGER, dtype=dtype) as llm:
        speculator = llm.llm_engine.model_executor.driver_worker.worker.model_runner.speculator
        assert (speculator.graphs is None) == (mode == graphs.EAGER)
        if speculator.config.resolved_rule == "cost_aware":
            assert speculator.cost_aware.rule.costs.points()["first"].keys() >= {1, 4}  # it was timed
            v2_harness.fix_costs(llm, CURVES)
        outputs = harness.generate(llm, PROMPTS, max_tokens=40, ignore_eos=True)
        return harness.rounds_of(outputs, harness.take_rounds(llm))


@pytest.mark.parametrize("mode", [graphs.PER_PASS, graphs.IF_NODES])
def test_captured_rounds_equal_eager_ones(tiny, mode, monkeypatch):
    eager = _rounds(tiny, graphs.EAGER, monkeypatch)
    lengths = {len(candidates) for request in eager for candidates, *_ in request}
    assert len(lengths) >= 4
    assert _rounds(tiny, mode, monkeypatch) == eager


@pytest.mark.parametrize("mode", [graphs.PER_PASS, graphs.IF_NODES])
def test_captured_rounds_in_bfloat16(tiny, mode, monkeypatch):
    """With FlashAttention 3, which takes no float32. A padded batch rounds otherwise, so near-ties may part."""
    eager = _rounds(tiny, graphs.EAGER, monkeypatch, "bfloat16")
    captured = _rounds(tiny, mode, monkeypatch, "bfloat16")
    firsts = [(a[0], b[0]) for a, b in zip(eager, captured, strict=True)]  # of the same prompt, still the same text
    assert sum(a == b for a, b in firsts) >= 0.75 * len(firsts)
    assert {len(candidates) for request in captured for candidates, *_ in request} > {1}


@pytest.mark.parametrize("mode", [graphs.PER_PASS, graphs.IF_NODES])
def test_captured_cost_aware_rounds_equal_eager_ones(tiny, mode, monkeypatch):
    """What the rule learns is let come one round late everywhere: else it may, or may not, be there in time."""
    late_copies(monkeypatch, by=1)
    rule: dict[str, Any] = {"rule": "cost_aware", "threshold": None}
    eager = _rounds(tiny, graphs.EAGER, monkeypatch, **rule)
    lengths = {len(candidates) for request in eager for candidates, *_ in request}
    assert len(lengths) >= 4
    assert _rounds(tiny, mode, monkeypatch, **rule) == eager


@pytest.mark.parametrize("mode", MODES)
def test_a_perfect_draft_is_always_accepted(tiny, mode, monkeypatch):
    for request in _rounds(tiny, mode, monkeypatch, model=tiny.target):
        assert all(accepted == len(candidates) for candidates, accepted, _ in request)
