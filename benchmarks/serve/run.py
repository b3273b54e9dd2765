# SPDX-License-Identifier: Apache-2.0
"""Measure speculation off, vLLM's draft_model and specdecpp's rules on the same prompts, interleaved in one run.

    python -m benchmarks.serve.run --pair TARGET DRAFT --data DIR --sets alpaca gsm8k humaneval mt_bench --prompts 20 \
        --methods off draft_model:2 draft_model:4 draft_model:6 draft_model:8 confidence entropy \
        --out benchmarks/results/X.jsonl

Each prompt is answered by all methods in a rotated order before the next prompt's turn. Raw rows are appended to
X.raw.jsonl as they are measured: run the same command again to go on after an interruption.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.common import options, session
from benchmarks.common.methods import parse_methods
from benchmarks.common.records import RawFile, load_prompts, make_units
from benchmarks.serve.report import write_report

MODULE = "benchmarks.serve.run"


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=summary)
    options.add_options(parser)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--batch", type=int, default=1, help="prompts at once; one set at a time")
    parser.add_argument("--methods", nargs="+", required=True, help="off, draft_model:K, rule[:option=value,...]")
    options.add_resume_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Command line: see the module's docstring."""
    return options.command(MODULE, make_parser(), _main, argv)


def _main(args: argparse.Namespace, argv: Sequence[str], started: float) -> int:
    methods = parse_methods(args.methods)
    raw_path = options.check_paths(args)
    prompts = load_prompts(args.data, args.sets, args.prompts)
    units = [session.Unit(unit, args.temperature) for unit in make_units(prompts, args.batch)]
    raw = RawFile(raw_path)
    settings = options.shared_settings(args) | {"temperature": args.temperature, "batch": args.batch}
    raw.start_run(settings, options.provenance(argv, MODULE, methods))
    if not session.execute(args, raw, units, methods, started):
        print("time is up; the same command goes on. To report what is there:")
        print(f"  python -m benchmarks.serve.report {raw_path} --out {args.out}")
        return 0
    print(write_report(raw, args.out, args.force))
    return 0


if __name__ == "__main__":
    sys.exit(main())
