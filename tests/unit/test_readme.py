# SPDX-License-Identifier: Apache-2.0
"""README and docs say what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vllm_specdecpp.config import SpecDecPPConfig, options_table
from vllm_specdecpp.rule_registry import RULES, rules_table

ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))
}
PAGES |= {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "benchmarks/README.md")}
PAGE = pytest.mark.parametrize("page", PAGES)


@pytest.mark.parametrize(("name", "table"), [("options", options_table), ("rules", rules_table)])
def test_table_is_generated(name, table):
    found = re.search(f"<!-- {name} -->\n(.*)\n<!-- /{name} -->", PAGES[f"docs/{name}.md"], re.DOTALL)
    assert found is not None
    assert found[1].strip() == table(), f"paste the output of {table.__module__}.{table.__name__}()"


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


@PAGE
def test_named_files_exist(page):
    text = PAGES[page]
    named = re.findall(r"`((?:vllm_specdecpp|benchmarks|examples|kernels|docs|tests)/[\w./-]*)`", text)
    linked = [(ROOT / page).parent / path for path in re.findall(r"\]\((?!http)([^)#]+)", text)]
    missing = [path for path in (*(ROOT / name for name in named), *linked) if not path.exists()]
    assert missing == []


def test_files_of_a_round_exist():
    """``docs/how-it-works.md`` names files below the package."""
    for path in re.findall(r"`((?:\w+/)*\w+\.py)`", PAGES["docs/how-it-works.md"]):
        assert (ROOT / path).exists() or any((ROOT / "vllm_specdecpp").rglob(path)), path


@PAGE
def test_named_modules_can_be_run(page):
    for module in re.findall(r"python -m ((?:benchmarks|vllm_specdecpp)[\w.]*)", PAGES[page]):
        path = ROOT / module.replace("vllm_specdecpp.kernels", "kernels").replace(".", "/")
        source = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        assert source.exists() and "__main__" in source.name + source.read_text(encoding="utf-8"), module


@PAGE
def test_named_make_targets_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"\bmake\s([a-z0-9-]+)(?=[` ])", " ".join(re.findall(r"`[^`]*`", PAGES[page]))))
    assert named <= targets, named - targets


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 150
