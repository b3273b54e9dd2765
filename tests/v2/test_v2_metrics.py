# SPDX-License-Identifier: Apache-2.0
"""As V1's, of metrics and of constraints, on Model Runner V2; and where the scheduler books more than is drafted."""

from __future__ import annotations

import pytest

from tests import engine_harness as harness
from tests.engine import test_constraints
from tests.engine import test_metrics_engine as v1
from tests.v2 import async_on_cpu

llm = v1.llm
test_metrics_agree = v1.test_metrics_agree
test_vllms_metrics_of_one_request_are_those_of_its_rounds = v1.test_vllms_metrics_of_one_request_are_those_of_its_rounds



def test_constraints_teach_nobody_else(llm, monkeypatch):
    """V1's test in this engine; interpreted kernels take their time."""
    monkeypatch.setattr(test_constraints, "NUM_PROMPTS", 2)
    monkeypatch.setattr(test_constraints, "MAX_TOKENS", 10)
    test_constraints.test_constraints_teach_nobody_else(llm)


def test_rows_that_are_booked_in_vain_are_counted(tiny, monkeypatch):
    async_on_cpu.allow(monkeypatch)
    config = {
        "method": "specdecpp", "model": tiny.draft_good, "rule": "confidence", "threshold": 0.8,
        "num_speculative_tokens": v1.BOUND,
    }  # fmt: skip
    with harness.engine(tiny.target, config, async_scheduling=True, **v1.OPTIONS) as llm:
        harness.generate(llm, harness.prompts(4, seed=9), ignore_eos=True, max_tokens=12)
        found = v1.shown(llm)
    assert found["booked_rows", ""] > 0
    booked = v1.total(found, "candidates") + found["booked_rows", ""]
    assert booked == pytest.approx(found["spec_decode_num_draft_tokens", ""], abs=0)
    assert v1.total(found, "accepted") == found["spec_decode_num_accepted_tokens", ""] > 0
