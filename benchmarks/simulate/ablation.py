# SPDX-License-Identifier: Apache-2.0
"""What each mechanism and each constant of who drafts earns: simulated with and without, or halved and doubled.

    python -m benchmarks.simulate.ablation --streams markov shift --seeds 4 --out benchmarks/results/x.jsonl

Each cell is served by the rule as it is and by each changed one, on the same requests, with the same noise in what they
observe and in what start-up measured. A ratio below 1 says that the change costs, one above 1 that it earns. The batch
is always full, so what judges a request in the usual batch (``admission._BATCH_MEMORY``) cannot be seen here.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from benchmarks.common.provenance import command_line, git_state, versions
from benchmarks.simulate import play as simulate
from benchmarks.simulate.server import Run, Server
from benchmarks.simulate.settings import SETTINGS, cost_model
from benchmarks.simulate.streams import DEPTH, STREAMS
from vllm_specdecpp.decision.cost_aware import admission, output_lengths, purse, records
from vllm_specdecpp.decision.cost_aware.rule import CostAwareRule

WORTH = 0.005
"""Less than this in every cell is not worth a mechanism."""
SIGMAS = 2.5
"""Standard errors that a difference must exceed besides."""


def _all_alike(rule: CostAwareRule) -> None:
    of = rule.admission.records.of
    setattr(rule.admission.records, "of", lambda names, *kinds: of([""] * len(names), *kinds))  # noqa: B010


def _no_levels(rule: CostAwareRule) -> None:
    plan = rule.admission.plan

    def planned(*arguments: Any) -> admission.Admitted:
        admitted = plan(*arguments)
        admitted.levels = None
        return admitted

    setattr(rule.admission, "plan", planned)  # noqa: B010


MECHANISMS: dict[str, tuple[str, Callable[[CostAwareRule], None]]] = {
    "own": ("every request is like one of which nothing is known", _all_alike),
    "easy": ("no request is hoped to be easier than the others", lambda rule: None),
    "levels": ("a request's record tells nothing of its later candidates", _no_levels),
    "purse": ("nothing is earned for trials after the opening sum", lambda rule: setattr(rule.purse, "_share", 0.0)),
    "pace": (
        "each cost curve finds out by itself how fast the machine is",
        lambda rule: setattr(rule.costs.pace, "_share", 0.0),
    ),
    "correction": (
        "rounds are taken to be as fast as the formula says",
        lambda rule: setattr(rule.admission, "learn", lambda *outcome: None),
    ),
    "spread": (
        "reading is spread over all that a request may emit",
        lambda rule: setattr(rule.admission.lengths, "remaining", lambda name, room, runs: room),
    ),
    "calibration": ("scores are taken for probabilities, as they come", lambda rule: setattr(rule, "adapt", False)),
}
"""Name -> what is then so, and what takes it out of a rule that has not served yet."""
CONSTANTS = (
    "admission._ENOUGH", "admission._FIT_MEMORY", "admission._MOST_READING", "admission._SHARE",
    "admission._SLOW_START", "records._MEAN", "records._WEIGHT",
    "records._MEMORY", "records._OWN", "records._OWN_MEMORY", "records._FADE", "records.EASY", "records._SHARE",
    "records._HOPE", "records._SURE", "purse._SHARE", "purse._OPENING", "output_lengths._MEAN",
    "output_lengths._MEMORY",
)  # fmt: skip
_NEAR_ONE = ("records._MEAN", "records._FADE", "records.EASY", "records._SURE")
"""Of these the distance to 1 is halved and doubled."""
_MODULES = {"admission": admission, "records": records, "purse": purse, "output_lengths": output_lengths}


def where(constant: str) -> tuple[ModuleType, str]:
    """The module that reads a constant, and its name there."""
    module, _, name = constant.partition(".")
    return _MODULES[module], name


@contextmanager
def changed(names: Sequence[str]) -> Iterator[None]:
    """Constants are other ones for a while; mechanisms that are no constant's are left alone."""
    before: list[tuple[ModuleType, str, float]] = []

    def put(constant: str, value: float) -> None:
        module, name = where(constant)
        for user in (module, admission) if constant == "records.EASY" else (module,):  # admission imports it
            before.append((user, name, getattr(user, name)))
            setattr(user, name, value)

    try:
        for change in names:
            if change == "easy":
                put("records._SHARE", 1e-300)
            elif change not in MECHANISMS:
                constant, factor = change[:-2], 2.0 if change.endswith("*2") else 0.5
                now = getattr(*where(constant))
                put(constant, 1 - (1 - now) * factor if constant in _NEAR_ONE else now * factor)
        yield
    finally:
        for module, name, value in reversed(before):
            setattr(module, name, value)


def play(server: Server, seed: int, names: Sequence[str]) -> Run:
    """Served by a cold rule with these changes: mechanisms taken out, constants halved ("/2") or doubled ("*2")."""
    with changed(names):
        rule = CostAwareRule(cost_model(server.setting, seed), DEPTH)
        rule.purse = purse.Purse(purse._SHARE, purse._OPENING)  # its defaults are those of the import
        for name in names:
            if name in MECHANISMS:
                MECHANISMS[name][1](rule)
        return server.play(rule, seed)


def serve(
    cell: tuple[str, str, int], options: argparse.Namespace, changes: Sequence[tuple[str, ...]]
) -> tuple[list[float], float]:
    """Tokens per second of the rule with each of ``changes``, for (costs, stream, seed); and those of K = 0."""
    costs, stream, seed = cell
    setting = SETTINGS[costs]
    streams = simulate.streams_of(stream, setting, options, seed)
    server = Server(setting, streams, simulate.tokens_of(setting, options.tokens))
    return [play(server, seed, names).rate for names in changes], setting.batch / setting.verify(setting.batch)


def geometric(values: Sequence[float]) -> float:
    return math.exp(float(np.mean(np.log(values))))


def error(values: Sequence[float]) -> float:
    """Standard error of the mean log-ratio; infinite for one seed."""
    return float(np.std(np.log(values), ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.inf


def ratio_text(values: Sequence[float]) -> str:
    """A ratio; bold where it is a difference worth naming."""
    ratio, spread = geometric(values), error(values)
    text = f"{ratio:.3f}"
    return f"**{text}**" if abs(ratio - 1) >= WORTH and abs(math.log(ratio)) > SIGMAS * spread else text


def write(rows: Sequence[Mapping[str, Any]], out: Path, command: str) -> None:
    """``out`` (JSONL), and beside it the page (.md)."""
    origin = {"command": command, "versions": versions(), "git": git_state()}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps({**row, **origin}) + "\n" for row in rows), encoding="utf-8")
    out.with_suffix(".md").write_text(page(rows, command), encoding="utf-8")


def page(rows: Sequence[Mapping[str, Any]], command: str) -> str:
    """Mechanisms by cell, and what mechanisms and constants say over all cells."""
    names = [name for name in rows[0]["changed"] if name in MECHANISMS]
    constants = [name[:-2] for name in rows[0]["changed"] if name.endswith("/2")]
    seeds = len(rows[0]["rates"])
    lines = [
        "Tokens/s of `cost_aware`, simulated, cold, and the ratio to it of the same rule without a mechanism, or with",
        f"one constant halved or doubled. Below 1: the change costs. {seeds} seed(s), {rows[0]['tokens']} tokens",
        "(more for batches), the same requests and the same noise for each.",
        f"Bold: {WORTH:.1%} or more, and beyond {SIGMAS} standard errors over the seeds; below, over the cells.",
    ]
    if names:
        lines += ["", f"| costs | batch | stream | /off | cost_aware | {' | '.join(f'−{n}' for n in names)} |"]
        lines += ["|---" * (5 + len(names)) + "|", *(_row(row, names) for row in rows)]
        lines += ["", "| without | geometric mean | noise | least | greatest |", "|---|---|---|---|---|"]
        lines += [f"| −{name} | {_over_all(rows, name)} |" for name in names]
        lines += ["", *(f"* −{name}: {MECHANISMS[name][0]}." for name in names)]
    if constants:
        lines += ["", "Constants; of those marked ¹ the distance to 1 is halved and doubled.", ""]
        lines += [f"| constant | is |{' geometric mean | noise | least | greatest |' * 2}", "|---" * 10 + "|"]
        lines += [
            f"| {name}{'¹' if name in _NEAR_ONE else ''} | {getattr(*where(name)):g} "
            f"| halved: {_over_all(rows, name + '/2')} | doubled: {_over_all(rows, name + '*2')} |"
            for name in constants
        ]
    lines += ["", f"{len(rows)} cells; noise: standard error of the mean over cells and seeds, as if all were alike."]
    known = ", ".join(f"{name} {version}" for name, version in versions().items())
    return "\n".join([*lines, "", f"`{command}`", "", f"{known}; git {git_state()}", ""])


def _ratios(row: Mapping[str, Any], name: str) -> list[float]:
    ratios: list[float] = (np.array(row["changed"][name]) / np.array(row["rates"])).tolist()
    return ratios


def _over_all(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    cells = {f"{row['costs']} {row['stream']}": _ratios(row, name) for row in rows}
    every = [ratio for ratios in cells.values() for ratio in ratios]
    ordered = sorted((geometric(ratios), cell) for cell, ratios in cells.items())
    (least, low), (most, high) = ordered[0], ordered[-1]
    return f"{ratio_text(every)} | {error(every):.4f} | {least:.3f} ({low}) | {most:.3f} ({high})"


def _row(row: Mapping[str, Any], names: Sequence[str]) -> str:
    whole = float(np.mean(row["rates"]))
    ratios = " | ".join(ratio_text(_ratios(row, name)) for name in names)
    start = f"| {row['costs']} | {row['batch']} | {row['stream']} |"
    return f"{start} {whole / row['off']:.3f} | {whole:.2f} | {ratios} |"


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulate.ablation", description=summary)
    parser.add_argument("--costs", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--streams", nargs="+", default=list(STREAMS), help="as for benchmarks.simulate")
    parser.add_argument("--without", nargs="*", default=list(MECHANISMS), metavar="NAME", help=", ".join(MECHANISMS))
    parser.add_argument("--constants", nargs="*", default=[], metavar="NAME", help=f"all, or {', '.join(CONSTANTS)}")
    parser.add_argument("--record", type=Path, help="dataset folder of vllm-specdecpp collect, for recorded streams")
    parser.add_argument("--tokens", type=int, default=4000, help="tokens that each rule emits; more for batches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--out", type=Path, help="result rows (JSONL), with a page (.md) beside them")
    parser.add_argument("--force", action="store_true", help="replace files that are there")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print the table; write it with ``--out``."""
    options = make_parser().parse_args(argv)
    constants = list(CONSTANTS) if options.constants == ["all"] else options.constants
    names = [*options.without, *(name + factor for name in constants for factor in ("/2", "*2"))]
    unknown = {*options.without} - MECHANISMS.keys() | {*constants} - {*CONSTANTS}
    command = command_line(sys.argv[1:] if argv is None else argv, "benchmarks.simulate.ablation")
    cells = [(costs, stream) for costs in options.costs for stream in options.streams]
    seeds = range(options.seed, options.seed + options.seeds)
    rows: list[dict[str, Any]] = []
    try:
        if unknown:
            known = ", ".join([*MECHANISMS, *CONSTANTS])
            raise ValueError(f"specdecpp: {', '.join(sorted(unknown))} is unknown; choose among {known}")
        if options.out is not None:
            for path in (options.out, options.out.with_suffix(".md")):
                if path.exists() and not options.force:
                    raise ValueError(f"specdecpp: {path} is there already; choose another name or pass --force")
        for stream in options.streams:
            simulate.streams_of(stream, SETTINGS[options.costs[0]], options, options.seed)
        with ProcessPoolExecutor(options.jobs) as pool:
            todo = [(*cell, seed) for cell in cells for seed in seeds]
            served = pool.map(partial(serve, options=options, changes=[(), *((name,) for name in names)]), todo)
            for costs, stream in cells:
                here = [next(served) for _ in seeds]
                columns = np.array([rates for rates, _ in here]).T  # [1 + num_changes, num_seeds]
                rows.append({
                    "costs": costs, "batch": SETTINGS[costs].batch, "stream": stream, "tokens": options.tokens,
                    "off": round(here[0][1], 4), "rates": columns[0].round(4).tolist(),
                    "changed": {n: c.round(4).tolist() for n, c in zip(names, columns[1:], strict=True)},
                })  # fmt: skip
                print(_row(rows[-1], options.without), flush=True)
                if options.out is not None:  # after each: a long run that is ended leaves what it has
                    write(rows, options.out, command)
    except ValueError as problem:
        print(f"benchmarks.simulate.ablation: {problem}", file=sys.stderr)
        return 2
    print(page(rows, command))
    return 0


if __name__ == "__main__":
    sys.exit(main())
