# SPDX-License-Identifier: Apache-2.0
"""Measuring: the units of prompts, the plan of what is still missing, and one raw row a unit and method."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from benchmarks.common.engines import Engines
from benchmarks.common.methods import OFF, Method, rotated
from benchmarks.common.options import engine_settings
from benchmarks.common.records import RawFile, Row, output_hash, unit_id

WARM_UP = "Write a short story about a lighthouse keeper who learns to count to one hundred."


@dataclass(frozen=True)
class Unit:
    """Prompts of one set that are answered together."""

    prompts: Sequence[Row]
    temperature: float
    cell: Mapping[str, float]
    """Keys that its raw rows have besides: the prompts alone do not tell two units apart."""
    methods: Sequence[Method]
    """Who answers it."""

    @property
    def id(self) -> str:
        """Its name in the raw rows."""
        return unit_id(self.prompts)

    def key(self, method: str) -> tuple[Any, ...]:
        """What :meth:`RawFile.done` says of its measurement by ``method``."""
        return (self.id, method, *self.cell.values())


Plan = list[tuple[Unit, list[Method]]]


class Progress:
    """Prints one line a measurement with the time that is left."""

    def __init__(self, plan: Plan, measured: list[Row]):
        self._left = [(method, unit.cell.get("batch")) for unit, order in plan for method in order]
        self._seconds: dict[tuple[str, float | None], list[float]] = {}
        for row in measured:
            self._note(row)

    def _note(self, row: Row) -> None:
        self._seconds.setdefault((row["method"], row.get("batch")), []).append(row["seconds"])

    def expected(self, unit: Unit, methods: list[Method]) -> float:
        """Seconds that these methods' next measurements will take, from those measured so far."""
        return self._expected([(method, unit.cell.get("batch")) for method in methods])

    def _expected(self, todo: list[tuple[Method, float | None]]) -> float:
        known = [second for seconds in self._seconds.values() for second in seconds]
        mean = sum(known) / len(known) if known else 0.0
        return sum(sum(s) / len(s) if (s := self._seconds.get((m.label, batch))) else mean for m, batch in todo)

    def done(self, unit: Unit, method: Method, row: Row) -> str:
        """Note one measurement; returns the line to print."""
        self._left.remove((method, unit.cell.get("batch")))
        self._note(row)
        length = f"K {row['candidates'] / row['rounds']:.1f}" if row["rounds"] else ""
        rate = row["tokens"] / row["seconds"]
        return (
            f"{row['prompt'][:32]:32} {method.label[:40]:40} {rate:6.2f} tok/s {length:8} "
            f"{len(self._left)} left, {self._expected(self._left) / 60:.0f} min"
        )


def encode(engines: Engines, prompts: Sequence[Row], args: argparse.Namespace) -> list[list[int]]:
    """Token ids of some prompts; ValueError if one has no room for its answer."""
    encoded = [engines.encode(prompt["prompt"]) for prompt in prompts]
    longest = max(map(len, encoded)) + args.max_tokens + args.max_candidates
    if longest > args.max_model_len:
        needed = f"{unit_id(prompts)} needs {longest} (prompt, new tokens, candidates)"
        raise ValueError(f"max_model_len {args.max_model_len}: {needed}; raise it")
    return encoded


def measure(engines: Engines, unit: Unit, method: Method, args: argparse.Namespace, off: str | None) -> Row:
    """One raw row: ``equals_off`` is None for ``off``, where off has not run yet, and where tokens are sampled."""
    prompts = encode(engines, unit.prompts, args)
    result = engines.generate(method, prompts, args.max_tokens, unit.temperature, args.top_k)
    output = output_hash(result.token_ids)
    return {
        "prompt": unit.id,
        "set": unit.prompts[0]["set"],
        **unit.cell,
        "method": method.label,
        "seconds": round(result.seconds, 4),
        "tokens": result.num_tokens,
        **result.counters,
        "output": output,
        "equals_off": None if method.name == OFF or off is None or unit.temperature > 0 else output == off,
        "ended": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def make_plan(units: Sequence[Unit], raw: RawFile) -> Plan:
    """The units that are not finished, each with its missing methods in this unit's order."""
    plan = []
    for turn, unit in enumerate(units):
        done = raw.done(*unit.cell)
        order = [method for method in rotated(unit.methods, turn) if unit.key(method.label) not in done]
        if order:
            plan.append((unit, order))
    return plan


def warm_up(engines: Engines, plan: Plan, methods: Sequence[Method], args: argparse.Namespace) -> None:
    """Every method once at each of its temperatures, with the fewest and with the most of its prompts at once."""
    for method in methods:
        print(f"warm-up: {method.label}", flush=True)
        mine = [unit for unit, order in plan if method in order]
        for temperature in sorted({unit.temperature for unit in mine}):
            sizes = [len(unit.prompts) for unit in mine if unit.temperature == temperature]
            for batch in dict.fromkeys((min(sizes), max(sizes))):
                prompts = [engines.encode(WARM_UP)] * batch
                engines.generate(method, prompts, args.warm_up_tokens, temperature, args.top_k)


def run_plan(
    engines: Engines, raw: RawFile, plan: Plan, methods: list[Method], args: argparse.Namespace, started: float
) -> bool:
    """Measure what is missing; returns False if the time budget ended it early."""
    progress = Progress(plan, raw.rows)
    warm_up(engines, plan, methods, args)
    for unit, order in plan:
        if args.minutes is not None and time.monotonic() - started + progress.expected(unit, order) > 60 * args.minutes:
            return False
        outputs = {(r["prompt"], r["method"], *(r[key] for key in unit.cell)): r["output"] for r in raw.rows}
        off = outputs.get(unit.key(OFF))
        for method in order:
            row = measure(engines, unit, method, args, off)
            raw.add({**row, "measured_in": raw.runs[-1]["run"]})
            off = row["output"] if method.name == OFF else off
            print(progress.done(unit, method, row), flush=True)
    return True


def execute(
    args: argparse.Namespace, raw: RawFile, units: Sequence[Unit], methods: list[Method], started: float
) -> bool:
    """Start the engines and measure what is missing; returns False if the time budget ended it early."""
    plan = make_plan(units, raw)
    missing = sum(len(order) for _, order in plan)
    print(f"{missing} measurements to do: {len(methods)} methods, {len(units)} units of prompts", flush=True)
    if not plan:
        return True
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    engines = Engines(engine_settings(args, max(len(unit.prompts) for unit in units)), methods)
    try:
        engines.start()
        return run_plan(engines, raw, plan, methods, args, started)
    finally:
        engines.close()
