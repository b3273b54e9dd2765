# SPDX-License-Identifier: Apache-2.0
"""Bugs that tests plant, to show that a comparison has power: a registry, and how to plant them in a running object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Bugs(dict[str, Callable[..., None]]):
    """name → what plants the bug, in the order of definition."""

    def named(self, name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
        """Register the decorated function."""

        def register(plant: Callable[..., None]) -> Callable[..., None]:
            assert name not in self, name
            self[name] = plant
            return plant

        return register


def change_result(monkeypatch: Any, owner: Any, name: str, change: Callable[..., Any]) -> None:
    """``owner.name`` goes on doing what it does; ``change(result, *arguments)`` is returned instead."""
    original = getattr(owner, name)

    def changed(*args: Any, **kwargs: Any) -> Any:
        return change(original(*args, **kwargs), *args)

    monkeypatch.setattr(owner, name, changed)


def after(monkeypatch: Any, owner: Any, name: str, change: Callable[..., Any]) -> None:
    """``owner.name`` runs as it is, then ``change(*its arguments)``."""

    def unchanged(result: Any, *args: Any) -> Any:
        change(*args)
        return result

    change_result(monkeypatch, owner, name, unchanged)


def change_arguments(monkeypatch: Any, owner: Any, name: str, change: Callable[..., tuple[Any, ...]]) -> None:
    """``owner.name`` is given ``change(*its arguments)``."""
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: original(*change(*args), **kwargs))
