# SPDX-License-Identifier: Apache-2.0
"""Measure one rule against speculation off and the best fixed K in every cell: set x temperature x batch.

    python -m benchmarks.serve.matrix --pair TARGET DRAFT --data DIR --prompts 32 --turns 8 --max-tokens 96 \
        --out benchmarks/results/X.jsonl

A cell's prompts are answered in groups of its batch size; all methods answer a group, in a rotated order, before the
next group's. Every turn visits all cells, so that a run that is cut short has something of each. The engines live
through all cells, and with them what the rules have learnt, as in a server whose load changes.
Raw rows are appended to X.raw.jsonl: run the same command again to go on after an interruption. The last line of the
output is one JSON object.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.common import options, session
from benchmarks.common.methods import Method, parse_methods
from benchmarks.common.records import RawFile, Row, load_prompts, make_units
from benchmarks.serve.matrix_report import write_report

MODULE = "benchmarks.serve.matrix"


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=summary)
    options.add_options(parser)
    parser.set_defaults(prompts=32, kv_cache_mib=1024)
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 1.0])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--turns", type=int, default=8, help="visits to each cell, while it has prompts")
    parser.add_argument(
        "--visit", type=int, default=4, help="prompts that a cell answers in a turn; a larger batch answers one group"
    )
    parser.add_argument("--fixed-k", nargs="+", type=int, default=[1, 2, 3, 5, 8, 12], help="K of draft_model")
    parser.add_argument("--rules", nargs="+", help="ours; by default threshold (with a head), confidence, cost_aware")
    parser.add_argument("--judged", help="the method of the heat maps; by default the last of the rules")
    options.add_resume_options(parser)
    return parser


def methods_of(args: argparse.Namespace) -> list[Method]:
    """Off, the fixed K, our rules."""
    rules = args.rules or [*(["threshold"] if args.head else []), "confidence", "cost_aware"]
    return parse_methods(["off", *(f"draft_model:{k}" for k in args.fixed_k), *rules])


def judged_method(args: argparse.Namespace, methods: Sequence[Method]) -> str:
    """Label of the method that the heat maps are of; ValueError if it is not measured or is a base of the ratios."""
    label = methods[-1].label if args.judged is None else parse_methods([args.judged])[0].label
    if label not in [method.label for method in methods if method.is_rule]:
        raise ValueError(f"--judged {label}: must be one of --rules")
    return label


def make_cells(
    prompts: dict[str, list[Row]], temperatures: Sequence[float], batches: Sequence[int], turns: int, visit: int
) -> list[session.Unit]:
    """The units of all cells, turn after turn.

    Args:
        prompts: of each set.
        turns: visits to each cell, while it has prompts.
        visit: prompts a cell answers in a turn, rounded up to whole groups.

    Raises:
        ValueError: a number that is none, or a batch that is larger than the number of prompts.
    """
    for option, values in (("--temperatures", temperatures), ("--batches", batches)):
        if len(set(values)) < len(values):
            raise ValueError(f"{option} {' '.join(f'{value:g}' for value in values)}: name each once")
    if min(temperatures) < 0 or min(batches) < 1 or turns < 1 or visit < 1:
        raise ValueError("--temperatures must be 0 or more, --batches, --turns and --visit 1 or more")
    fewest = min(map(len, prompts.values()))
    if max(batches) > fewest:
        raise ValueError(f"--batches {max(batches)}: there are {fewest} prompts a set; raise --prompts")
    return [
        session.Unit(unit, temperature, {"temperature": temperature, "batch": batch})
        for turn in range(turns)
        for temperature in temperatures
        for batch in batches
        for name, rows in prompts.items()
        for unit in make_units({name: rows}, batch)[turn * -(-visit // batch) : (turn + 1) * -(-visit // batch)]
    ]


def main(argv: list[str] | None = None) -> int:
    """Command line: see the module's docstring."""
    return options.command(MODULE, make_parser(), _main, argv)


def _main(args: argparse.Namespace, argv: Sequence[str], started: float) -> int:
    methods = methods_of(args)
    judged = judged_method(args, methods)
    raw_path = options.check_paths(args)
    prompts = load_prompts(args.data, args.sets, args.prompts)
    units = make_cells(prompts, args.temperatures, args.batches, args.turns, args.visit)
    raw = RawFile(raw_path)
    raw.start_run(options.shared_settings(args), options.provenance(argv, MODULE, methods) | {"judged": judged})
    if not session.execute(args, raw, units, methods, started):
        print("time is up; the same command goes on. To report what is there:")
        print(f"  python -m benchmarks.serve.matrix_report {raw_path} --out {args.out}")
        return 0
    print(write_report(raw, args.out, args.force))
    return 0


if __name__ == "__main__":
    sys.exit(main())
