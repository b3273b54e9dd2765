# SPDX-License-Identifier: Apache-2.0
"""The option schema: defaults, splitting the user's dict, and one line for every bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from vllm_specdecpp.config import SpecDecPPConfig
from vllm_specdecpp.rule_registry import RULES

PASSTHROUGH = ["method", "model", "num_speculative_tokens", "revision", "draft_tensor_parallel_size", "quantization"]


def split(**options: Any) -> tuple[SpecDecPPConfig, dict[str, Any]]:
    return SpecDecPPConfig.from_speculative_config({"method": "specdecpp", **options}, PASSTHROUGH)


def test_defaults() -> None:
    config, passed_on = split(model="draft")
    assert (config.resolved_rule, config.resolved_threshold) == ("cost_aware", None)
    assert (config.num_speculative_tokens, config.min_speculative_tokens, config.trace_rounds) == (20, 1, 0)
    assert passed_on == {"model": "draft", "num_speculative_tokens": 20}


@pytest.mark.parametrize(
    ("options", "rule", "threshold"),
    [
        ({"head": "h"}, "cost_aware", None),
        ({"threshold": 0.3}, "confidence", 0.3),
        ({"head": "h", "threshold": 0.3}, "threshold", 0.3),
        ({"min_speculative_tokens": 2}, "confidence", RULES["confidence"].threshold),
        ({"head": "h", "min_speculative_tokens": 2}, "threshold", 0.7),
        ({"head": "h", "rule": "threshold"}, "threshold", 0.7),
    ],
)
def test_the_rule_that_the_other_options_ask_for(options: dict[str, Any], rule: str, threshold: float | None) -> None:
    config, _ = split(model="draft", **options)
    assert (config.resolved_rule, config.resolved_threshold) == (rule, threshold)


def test_fixed_has_no_threshold() -> None:
    config, _ = split(model="draft", rule="fixed")
    assert (config.resolved_rule, config.resolved_threshold) == ("fixed", None)


def test_split_keeps_ours_and_passes_on_vllms() -> None:
    config, passed_on = split(
        **{"model": "draft", "num_speculative_tokens": 7, "threshold": 0.5, "rule": "entropy", "quantization": None},
        draft_tensor_parallel_size=2,
    )
    assert (config.num_speculative_tokens, config.threshold, config.rule) == (7, 0.5, "entropy")
    assert passed_on == {
        "model": "draft",
        "num_speculative_tokens": 7,
        "draft_tensor_parallel_size": 2,
        "quantization": None,
    }


def test_both_bounds_are_inclusive() -> None:
    for length in (1, 128):
        config, _ = split(model="draft", num_speculative_tokens=length, min_speculative_tokens=length)
        assert config.min_speculative_tokens == config.num_speculative_tokens == length


def test_none_means_the_default() -> None:
    assert split(model="draft", num_speculative_tokens=None, rule=None, trace_rounds=None) == split(model="draft")


def test_the_users_dict_is_left_alone() -> None:
    user = {"method": "specdecpp", "model": "draft", "min_speculative_tokens": 2}
    before = dict(user)
    SpecDecPPConfig.from_speculative_config(user, PASSTHROUGH)
    assert user == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "model is missing; it must name the draft model"),
        ({"model": ""}, "model='' must name the draft model"),
        ({"model": 3}, "model=3 must name the draft model"),
        ({"model": "d", "threshold": 1.5}, "threshold=1.5 must lie strictly between 0 and 1 (e.g. 0.7)"),
        ({"model": "d", "threshold": 0}, "threshold=0 must lie strictly between 0 and 1"),
        ({"model": "d", "threshold": 1.0}, "threshold=1.0 must lie strictly between 0 and 1"),
        ({"model": "d", "threshold": -0.1}, "threshold=-0.1 must lie strictly between 0 and 1"),
        ({"model": "d", "threshold": float("nan")}, "threshold=nan must lie strictly between 0 and 1"),
        ({"model": "d", "threshold": float("inf")}, "threshold=inf must lie strictly between 0 and 1"),
        ({"model": "d", "threshold": "0.5"}, "threshold='0.5' is text; write the number without quotes"),
        ({"model": "d", "threshold": True}, "threshold=True must lie strictly between 0 and 1"),
        ({"model": "d", "num_speculative_tokens": 0}, "num_speculative_tokens=0 must be a whole number from 1 to 128"),
        ({"model": "d", "num_speculative_tokens": -1}, "num_speculative_tokens=-1 must be a whole number from 1"),
        ({"model": "d", "num_speculative_tokens": 129}, "num_speculative_tokens=129 must be a whole number from 1"),
        ({"model": "d", "num_speculative_tokens": 5.5}, "num_speculative_tokens=5.5 must be a whole number from 1"),
        ({"model": "d", "num_speculative_tokens": True}, "num_speculative_tokens=True must be a whole number from 1"),
        ({"model": "d", "num_speculative_tokens": "5"}, "num_speculative_tokens='5' is text; write the number"),
        ({"model": "d", "min_speculative_tokens": 0}, "min_speculative_tokens=0 must be a whole number from 1 to"),
        (
            {"model": "d", "min_speculative_tokens": 5, "num_speculative_tokens": 4},
            "min_speculative_tokens=5 exceeds num_speculative_tokens=4; lower the first or raise the second",
        ),
        ({"model": "d", "trace_rounds": -1}, "trace_rounds=-1 must be a whole number, 0 or more"),
        ({"model": "d", "rule": "magic"}, "rule='magic' must be one of 'cost_aware', 'fixed', 'threshold',"),
        ({"model": "d", "rule": "cost_aware", "threshold": 0.3}, "threshold=0.3 has no meaning with rule='cost_aware'"),
        (
            {"model": "d", "rule": "cost_aware", "min_speculative_tokens": 2},
            "min_speculative_tokens=2 has no meaning with rule='cost_aware', which drafts nothing where that is faster",
        ),
        ({"model": "d", "rule": "threshold"}, "rule='threshold' needs an acceptance head; add head="),
        ({"model": "d", "rule": "confidence", "head": "h"}, "rule='confidence' does not use head='h'; leave one of"),
        ({"model": "d", "rule": "entropy", "head": "h"}, "rule='entropy' does not use head='h'"),
        ({"model": "d", "rule": "fixed", "head": "h"}, "rule='fixed' does not use head='h'"),
        ({"model": "d", "rule": "fixed", "threshold": 0.5}, "threshold=0.5 has no meaning with rule='fixed'"),
        ({"model": "d", "head": ""}, "head='' must name the acceptance head"),
        ({"model": "d", "head": ["h"]}, "head=['h'] must name the acceptance head"),
        ({"model": "d", "head_revision": "main"}, "head_revision='main' has no head to go with; add head="),
        ({"model": "d", "treshold": 0.5}, "unknown option treshold=0.5; did you mean 'threshold'?"),
        ({"model": "d", "Num_Speculative_Token": 5}, "unknown option Num_Speculative_Token=5; did you mean 'num_spec"),
        ({"model": "d", "draft_tensor_parallel": 2}, "did you mean 'draft_tensor_parallel_size'?"),
        ({"model": "d", "zzz": 1}, "unknown option zzz=1; our options are model, head"),
    ],
)
def test_bad_options_give_one_line_with_option_value_and_mend(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        split(**options)
    text = str(caught.value)
    assert text.startswith("specdecpp: ") and "\n" not in text
    assert message in text


def test_two_errors_are_named_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"threshold=2\.0 must lie.*; trace_rounds=-1 must be") as caught:
        split(model="d", threshold=2.0, trace_rounds=-1)
    assert "\n" not in str(caught.value)


def test_the_config_is_frozen() -> None:
    config, _ = split(model="d")
    with pytest.raises(ValueError, match="frozen"):
        config.threshold = 0.2


@pytest.mark.parametrize(
    "options",
    [
        {"model": "d"},
        {"model": "d", "head": "h", "head_revision": "main", "threshold": 0.1},
        {"model": "d", "rule": "fixed", "num_speculative_tokens": 3, "trace_rounds": 100},
    ],
)
def test_additional_config_survives_json(options: dict[str, Any]) -> None:
    config, _ = split(**options)
    assert SpecDecPPConfig.from_additional_config(json.loads(json.dumps(config.to_additional_config()))) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "d", "treshold": 0.2}, "did you mean 'threshold'"),
        ({"model": "d", "threshold": 2}, "threshold=2 must lie strictly"),
    ],
)
def test_bad_additional_config(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpecDecPPConfig.from_additional_config(options)


class TestWithChanges:
    def test_a_change_is_checked_and_leaves_the_original(self) -> None:
        config, _ = split(model="d", threshold=0.3, num_speculative_tokens=8)
        changed = config.with_changes({"threshold": 0.9, "num_speculative_tokens": 4})
        assert (changed.threshold, changed.num_speculative_tokens) == (0.9, 4)
        assert (config.threshold, config.num_speculative_tokens) == (0.3, 8)

    def test_another_rule_starts_at_its_own_threshold(self) -> None:
        config, _ = split(model="d", rule="confidence", threshold=0.3)
        assert config.with_changes({"rule": "entropy"}).resolved_threshold == RULES["entropy"].threshold
        assert config.with_changes({"rule": "fixed"}).resolved_threshold is None
        assert config.with_changes({"rule": "confidence"}).resolved_threshold == 0.3
        assert config.with_changes({"rule": "entropy", "threshold": 0.2}).resolved_threshold == 0.2

    def test_none_resets_to_the_default(self) -> None:
        config, _ = split(model="d", threshold=0.3)
        assert config.with_changes({"threshold": None}).threshold is None

    def test_a_loaded_head_may_idle_and_come_back(self) -> None:
        config, _ = split(model="d", head="h", threshold=0.4)
        for rule in ("cost_aware", "fixed", "confidence", "entropy"):
            idle = config.with_changes({"rule": rule})
            assert (idle.resolved_rule, idle.head) == (rule, "h")
            assert idle.with_changes({"rule": "threshold"}).resolved_rule == "threshold"

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model": "e"}, "model='e' cannot change at run time"),
            ({"head": "g"}, "head='g' cannot change at run time"),
            ({"rule": "threshold"}, "needs an acceptance head"),
            ({"threshold": 1}, "threshold=1 must lie strictly"),
            ({"min_speculative_tokens": 30}, "min_speculative_tokens=30 exceeds num_speculative_tokens=20"),
            ({"tau": 1}, "unknown option tau=1"),
        ],
    )
    def test_bad_changes(self, changes: dict[str, Any], message: str) -> None:
        config, _ = split(model="d")
        with pytest.raises(ValueError, match=message) as caught:
            config.with_changes(changes)
        assert "\n" not in str(caught.value)


def test_every_field_is_described() -> None:
    properties = SpecDecPPConfig.model_json_schema()["properties"]
    assert [name for name, field in properties.items() if not field.get("description")] == []


def test_importing_the_schema_loads_neither_torch_nor_vllm() -> None:
    code = "import sys, vllm_specdecpp.config; print([m for m in ('torch', 'vllm') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sources": []}, "sources=.* must name one or more of 'suffix', 'draft_model', each once"),
        ({"sources": ["draft_model", "ngram"]}, "sources=.* must name one or more of"),
        ({"sources": ["draft_model", "draft_model"]}, "sources=.* must name one or more of"),
        ({"sources": "suffix"}, "sources='suffix' must name one or more of"),
        ({"sources": ["suffix"], "head": "h"}, "sources=.* has no draft model that head='h' could be of; leave one"),
        ({"sources": ["suffix"], "rule": "fixed"}, "sources=.* needs rule='cost_aware'.*; leave one"),
        ({"sources": ["suffix", "draft_model"], "rule": "fixed"}, "sources=.* needs rule='cost_aware'.*; leave one"),
        ({"suffix_cache": "all"}, "suffix_cache='all' must be 'request', or 'engine' to look in"),
        ({"suffix_cache": "engine", "rule": "fixed"}, "suffix_cache='engine' needs the source 'suffix' and rule="),
        ({"suffix_cache": "engine", "sources": ["draft_model"]}, "suffix_cache='engine' needs .*; leave it out"),
    ],
)
def test_bad_sources_are_refused_in_one_line(options, says):
    with pytest.raises(ValueError, match=f"^specdecpp: {says}[^\n]*$"):
        SpecDecPPConfig.from_additional_config({"model": "d", **options})


def test_runs_go_with_the_rule_that_weighs_them():
    assert SpecDecPPConfig(model="d").run_sources == ["suffix"]
    assert SpecDecPPConfig(model="d", sources=["draft_model"]).run_sources == []
    given = SpecDecPPConfig(model="d", sources=["suffix", "draft_model"])
    assert given.with_changes({"rule": "fixed"}).with_changes({"rule": "cost_aware"}).run_sources == ["suffix"]
    with pytest.raises(ValueError, match="sources=.* needs rule='cost_aware'"):
        SpecDecPPConfig(model="d", sources=["suffix"]).with_changes({"rule": "fixed"})
    for changes in ({"sources": ["draft_model"]}, {"suffix_cache": "engine"}):
        with pytest.raises(ValueError, match=f"{next(iter(changes))}=.* cannot change at run time"):
            SpecDecPPConfig(model="d").with_changes(changes)
    cached = SpecDecPPConfig(model="d", suffix_cache="engine").with_changes({"rule": "fixed"})
    assert cached.with_changes({"rule": "cost_aware"}).suffix_cache == "engine"
    with pytest.raises(ValueError, match="sources=.* cannot change at run time"):
        SpecDecPPConfig(model="d").with_changes({"sources": ["draft_model"]})
