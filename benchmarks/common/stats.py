# SPDX-License-Identifier: Apache-2.0
"""From raw rows to cells: tokens/s of a (set, method) with a bootstrap interval, and ratios paired by prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

from benchmarks.common.methods import NATIVE, OFF, parse_method

RESAMPLES = 4000
ALL = "all"
Row = Mapping[str, Any]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Spread:
    """A value with the ends of its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Cell:
    """One set and method. ``mean_candidate_length`` and ``acceptance`` are None where nothing was drafted."""

    set: str
    method: str
    tokens_per_second: Spread
    mean_candidate_length: float | None
    acceptance: float | None
    units: int
    equal_outputs: int | None = None
    over_off: Spread | None = None
    over_best_fixed_k: Spread | None = None
    best_fixed_k: int | None = None
    over_rival: Spread | None = None
    """Over the fastest of vLLM's own methods, speculation off among them."""
    rival: str | None = None


def _spread(rate_of: Callable[..., Floats], *columns: Floats, seed: int) -> Spread:
    """``rate_of`` the columns, [num_units] each, with its percentile interval over units; one unit has none."""
    value = float(rate_of(*columns))
    if len(columns[0]) == 1:
        return Spread(value, value, value)
    found = bootstrap(
        columns, rate_of, paired=True, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(seed)
    )
    return Spread(value, *map(float, found.confidence_interval))


def rate(tokens: Floats, seconds: Floats, seed: int = 0) -> Spread:
    """Total tokens over total seconds, units resampled with replacement.

    Args:
        tokens, seconds: one entry a unit. # [num_units]
    """

    def found(tokens: Floats, seconds: Floats, axis: int = -1) -> Floats:
        return tokens.sum(axis) / seconds.sum(axis)

    return _spread(found, tokens, seconds, seed=seed)


def rate_ratio(tokens: Floats, seconds: Floats, base_tokens: Floats, base_seconds: Floats, seed: int = 0) -> Spread:
    """Tokens/s over the tokens/s of a base method; both share each resample, so a hard prompt weighs on both alike."""

    def found(tokens: Floats, seconds: Floats, base_tokens: Floats, base_seconds: Floats, axis: int = -1) -> Floats:
        return (tokens.sum(axis) / seconds.sum(axis)) / (base_tokens.sum(axis) / base_seconds.sum(axis))

    return _spread(found, tokens, seconds, base_tokens, base_seconds, seed=seed)


def complete_units(rows: Sequence[Row], methods: Sequence[str]) -> dict[str, dict[str, Row]]:
    """Rows by unit and method, for the units that every method has finished: only those can be paired."""
    units: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["method"] in methods:
            units.setdefault(row["prompt"], {})[row["method"]] = row
    return {unit: by_method for unit, by_method in units.items() if len(by_method) == len(methods)}


def aggregate(rows: Sequence[Row], methods: Sequence[str]) -> list[Cell]:
    """Cells of every set, in the order of first appearance, and of all sets together (``all``).

    Raises:
        ValueError: no unit was finished by all methods.
    """
    units = complete_units(rows, methods)
    if not units:
        raise ValueError("no prompt was finished by every method yet: nothing to aggregate")
    sets = list(dict.fromkeys(by_method[methods[0]]["set"] for by_method in units.values()))
    cells: list[Cell] = []
    for name in [*sets, ALL]:
        chosen = [u for u in units.values() if name in (ALL, u[methods[0]]["set"])]
        cells += _with_ratios([_cell(name, method, chosen) for method in methods], chosen)
    return cells


def _column(units: Sequence[Mapping[str, Row]], method: str, key: str) -> Floats:
    return np.array([unit[method][key] for unit in units], dtype=np.float64)


def _cell(name: str, method: str, units: Sequence[Mapping[str, Row]]) -> Cell:
    rounds, candidates, accepted = (_column(units, method, key).sum() for key in ("rounds", "candidates", "accepted"))
    equal = None
    if method != OFF and OFF in units[0]:
        equal = sum(unit[method]["output"] == unit[OFF]["output"] for unit in units)
    return Cell(
        set=name,
        method=method,
        tokens_per_second=rate(_column(units, method, "tokens"), _column(units, method, "seconds")),
        mean_candidate_length=float(candidates / rounds) if rounds else None,
        acceptance=float(accepted / candidates) if candidates else None,
        units=len(units),
        equal_outputs=equal,
    )


def best_fixed_k(cells: Sequence[Cell]) -> Cell | None:
    """The fastest ``draft_model`` cell of one set: chosen on the very data it is judged by, which favours it."""
    native = [cell for cell in cells if parse_method(cell.method).name == NATIVE]
    return max(native, key=lambda cell: cell.tokens_per_second.value, default=None)


def best_rival(cells: Sequence[Cell]) -> Cell | None:
    """The fastest of vLLM's own methods: chosen on the very data it is judged by, which favours it."""
    others = [cell for cell in cells if not parse_method(cell.method).is_rule]
    return max(others, key=lambda cell: cell.tokens_per_second.value, default=None)


def _with_ratios(cells: list[Cell], units: Sequence[Mapping[str, Row]]) -> list[Cell]:
    best, rival = best_fixed_k(cells), best_rival(cells)

    def over(cell: Cell, base: str) -> Spread:
        tokens, seconds = (_column(units, cell.method, key) for key in ("tokens", "seconds"))
        base_tokens, base_seconds = (_column(units, base, key) for key in ("tokens", "seconds"))
        return rate_ratio(tokens, seconds, base_tokens, base_seconds)

    return [
        replace(
            cell,
            over_off=over(cell, OFF) if OFF in units[0] else None,
            over_best_fixed_k=over(cell, best.method) if best else None,
            best_fixed_k=parse_method(best.method).fixed_k if best else None,
            over_rival=over(cell, rival.method) if rival else None,
            rival=rival.method if rival else None,
        )
        for cell in cells
    ]
