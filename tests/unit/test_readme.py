# SPDX-License-Identifier: Apache-2.0
"""The README says what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vllm_specdecpp.config import SpecDecPPConfig, options_table
from vllm_specdecpp.rule_registry import RULES, rules_table

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_option_table_is_the_schema():
    found = re.search(r"<!-- options -->\n(.*)\n<!-- /options -->", README, re.DOTALL)
    assert found is not None
    assert found[1].strip() == options_table(), "paste the output of vllm_specdecpp.config.options_table()"


def test_rule_table_is_the_registry():
    found = re.search(r"<!-- rules -->\n(.*)\n<!-- /rules -->", README, re.DOTALL)
    assert found is not None
    assert found[1].strip() == rules_table(), "paste the output of vllm_specdecpp.rule_registry.rules_table()"


@pytest.mark.parametrize(
    ("option", "concerns"),
    [("threshold", lambda rule: rule.threshold is not None), ("head", lambda rule: rule.reads_head)],
)
def test_help_names_the_rules_that_an_option_is_for(option, concerns):
    first = (SpecDecPPConfig.model_fields[option].description or "").split(":")[0]
    assert {name for name in RULES if f"``{name}``" in first} == {r.name for r in RULES.values() if concerns(r)}


def test_every_option_is_explained():
    for name, field in SpecDecPPConfig.model_fields.items():
        assert field.description and len(field.description) > 20, name


def test_named_files_exist():
    for path in re.findall(r"`((?:vllm_specdecpp|benchmarks|examples|kernels|docs|tests)/[\w./-]*)`", README):
        assert (ROOT / path).exists(), path


def test_named_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z0-9-]+)", README))
    assert named and named <= targets, named - targets
