# SPDX-License-Identifier: Apache-2.0
"""The rooms of the package, read from its imports: no circle, no file too long to read, no vLLM where none belongs."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "vllm_specdecpp"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / PACKAGE).rglob("*.py"))
}
LONGEST = 400
"""Lines of a file."""
WITHOUT_VLLM = ("data", "costs", "decision", "head", "training.fit", "training.replay")
"""Rooms whose modules import neither vLLM nor the engine."""


def imports(path: Path, everywhere: bool = True) -> set[str]:
    """Dotted names that a module imports; ``everywhere``: inside functions and for type checking, too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one import circle, the first one again at the end; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_import_circle() -> None:
    graph = {
        name: {other for other in imports(path) if other in MODULES and not f"{name}.".startswith(f"{other}.")}
        for name, path in MODULES.items()
    }
    assert sum(map(len, graph.values())) > 200
    assert circle(graph) == []


def test_a_circle_is_found() -> None:
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}


@pytest.mark.parametrize("room", WITHOUT_VLLM)
def test_rooms_without_vllm(room: str) -> None:
    members = [name for name in MODULES if f"{name}.".startswith(f"{PACKAGE}.{room}.")]
    assert members
    for name in members:
        found = imports(MODULES[name], everywhere=room == "decision")
        assert not [n for n in found if n.split(".")[0] == "vllm" or n.startswith(f"{PACKAGE}.engine")], name


def loaded(module: str, seen: set[str]) -> set[str]:
    """Fills ``seen`` with all names that importing a module imports at its top and at ours'."""
    parents = module.split(".")
    for name in {".".join(parents[:end]) for end in range(1, len(parents) + 1)} - seen:
        seen.add(name)
        if name in MODULES:
            for imported in imports(MODULES[name], everywhere=False):
                loaded(imported, seen)
    return seen


@pytest.mark.parametrize(("room", "vllm"), [("decision", False), ("engine.v1.proposer", True)])
def test_the_core_imports_no_vllm(room: str, vllm: bool) -> None:
    assert ("vllm" in loaded(f"{PACKAGE}.{room}", set())) is vllm


def test_files_are_short() -> None:
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_kernels_are_imported_under_one_name() -> None:
    """Imported as ``kernels`` they are other module objects: what a test patches there, the engine does not see."""
    folders = (PACKAGE, "kernels", "benchmarks", "examples", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    wrong = {str(path.relative_to(ROOT)) for path in files for name in imports(path) if name.split(".")[0] == "kernels"}
    assert len(files) > 100 and not wrong, "import vllm_specdecpp.kernels"
