# SPDX-License-Identifier: Apache-2.0
"""README and docs say what the code says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests import doc_tables, versions
from vllm_specdecpp.config import SpecDecPPConfig
from vllm_specdecpp.engine.hooks import LEDGER
from vllm_specdecpp.rule_registry import RULES

ROOT = Path(__file__).parents[2]
GLOBS = ("*.md", "docs/**/*.md", "benchmarks/README.md", "benchmarks/data/README.md", "examples/*.py")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted(path for glob in GLOBS for path in ROOT.glob(glob))
}
PAGE = pytest.mark.parametrize("page", PAGES)
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)\s#]*)(?:#([^)\s]+))?\)")


def anchors(page: Path) -> set[str]:
    """What may stand behind a ``#``: the headings, in small letters, with dashes for blanks and without other signs."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    ("page", "name", "table"),
    [
        ("options", "options", doc_tables.options),
        ("rules", "rules", doc_tables.rules),
        ("benchmarks", "versions", versions.table),
    ],
)
def test_table_is_generated(page, name, table):
    found = re.search(f"<!-- {name} -->\n(.*)\n<!-- /{name} -->", PAGES[f"docs/{page}.md"], re.DOTALL)
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
    assert [name for name in named if not (ROOT / name).exists()] == []


@PAGE
def test_links_lead_somewhere(page):
    for path, anchor in LINK.findall(FENCED.sub("", PAGES[page])):
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_the_site_builds_without_a_warning(tmp_path):
    """``make docs``: every page is in its index, every link and anchor is there."""
    pytest.importorskip("mkdocs")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    recipe = re.search(r"ln -sfn (.*) build/pages/$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert recipe is not None
    pages = tmp_path / "pages"
    pages.mkdir()
    for name in recipe[1].replace("$(CURDIR)/", "").split():
        (pages / name).symlink_to(ROOT / name)
    config = load_config(str(ROOT / "mkdocs.yml"), docs_dir=str(pages), site_dir=str(tmp_path / "site"), strict=True)
    build(config)  # raises on any warning
    for page in PAGES:
        if page.endswith(".md"):
            built = tmp_path / "site" / page.replace("README.md", "index").removesuffix(".md")
            assert built.with_suffix(".html").exists() or (built / "index.html").exists(), page


def test_every_report_and_issue_of_the_ledger_is_on_the_upstream_page():
    for hook in LEDGER:
        assert hook.upstream.split("#")[-1].removeprefix("docs/") in PAGES["docs/upstream.md"], hook.symbol


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


@pytest.mark.parametrize(
    ("version", "summary", "says"),
    [("0.32.1", "7 passed", "run: H, `tests/gpu/`: 7 passed"), ("0.33.0", "", "not run; ")],
)
def test_a_gpu_counts_as_run_where_its_results_are(tmp_path, version, summary, says):
    found = {"versions": {"vllm": version, "hardware": "H"}, "tests": {"passed": True, "summary": summary}}
    (tmp_path / "results.json").write_text(json.dumps(found))
    assert versions.on_gpu("0.32", "V2", tmp_path / "results.json").startswith(says)


def test_a_version_of_which_no_test_tells_is_not_in_the_table(monkeypatch):
    monkeypatch.setattr(versions, "SUPPORTED_VERSIONS", ("0.32", "0.34"))
    with pytest.raises(ValueError, match="0.34"):
        versions.table()
