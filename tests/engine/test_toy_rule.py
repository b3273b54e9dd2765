# SPDX-License-Identifier: Apache-2.0
"""A rule that is one class and one registration drafts on Model Runner V1; V2 is covered in ``tests/v2``."""

from __future__ import annotations

from tests import engine_harness as harness
from tests.toy_rule import registered


def test_a_registered_rule_drafts(tiny, monkeypatch):
    registered(monkeypatch)
    config = {"method": "specdecpp", "model": tiny.draft_good, "rule": "alternate", "num_speculative_tokens": 6}
    with harness.engine(tiny.target, config) as llm:
        harness.generate(llm, harness.prompts(3), ignore_eos=True)
        lengths = llm.collective_rpc("specdecpp_stats")[0]["lengths"]
    assert max(lengths) == 2 and lengths[2] > 10 and set(lengths) <= {0, 1, 2}
