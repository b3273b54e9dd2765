# SPDX-License-Identifier: Apache-2.0
"""What the command lines of the benchmark programs share."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.common.engines import EngineSettings
from benchmarks.common.methods import Method
from benchmarks.common.provenance import command_line, git_state, model_label, versions
from benchmarks.common.records import Row
from benchmarks.models.fetch import fetched


def add_resume_options(parser: argparse.ArgumentParser) -> None:
    """The options of a program that appends raw rows and can go on with them."""
    parser.add_argument("--minutes", type=float, help="stop before the prompt that would end later than this")
    parser.add_argument("--out", type=Path, required=True, help="X.jsonl; also writes X.raw.jsonl, X.md, X.png")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True, help="go on with X.raw.jsonl")
    parser.add_argument("--force", action="store_true", help="replace a finished report (raw rows are always kept)")


def check_paths(args: argparse.Namespace) -> Path:
    """Path of the raw rows. ValueError where a result would be overwritten."""
    if args.out.suffix != ".jsonl" or args.out.name.endswith(".raw.jsonl"):
        raise ValueError(f"--out {args.out}: the name must end in .jsonl (and not in .raw.jsonl)")
    if args.out.exists() and not args.force:
        raise ValueError(f"--out {args.out} is finished; choose another name or pass --force")
    raw: Path = args.out.with_suffix(".raw.jsonl")
    if raw.exists() and not args.resume:
        raise ValueError(f"{raw} is there already; drop --no-resume to go on with it or choose another --out")
    return raw


def shared_settings(args: argparse.Namespace) -> Row:
    """What must be the same for rows to be comparable; methods and the number of prompts may grow."""
    return {
        "pair": " + ".join(model_label(name) for name in args.pair),
        "head": model_label(args.head) if args.head else None,
        "top_k": args.top_k,
        "draft_sample_method": args.draft_sample_method,
        "max_tokens": args.max_tokens,
        "max_candidates": args.max_candidates,
        "eager": args.eager,
    }


def provenance(argv: Sequence[str], module: str, methods: Sequence[Method]) -> Row:
    """Where a run's rows come from."""
    return {
        "methods": [method.label for method in methods],
        "command": command_line(list(argv), module),
        "versions": versions(),
        "git": git_state(),
    }


def engine_settings(args: argparse.Namespace, batch: int) -> EngineSettings:
    """The engines of these options, for at most ``batch`` requests at once; models are fetched if need be."""
    target, draft = map(fetched, args.pair)
    return EngineSettings(
        target=target,
        draft=draft,
        head=args.head,
        draft_sample_method=args.draft_sample_method,
        num_speculative_tokens=args.max_candidates,
        batch=batch,
        max_model_len=args.max_model_len,
        kv_cache_bytes=args.kv_cache_mib << 20,
        eager=args.eager,
        other_drafts={name: fetched(place) for name, place in getattr(args, "other_drafts", {}).items()},
    )


def command(
    module: str,
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace, Sequence[str], float], int],
    argv: list[str] | None,
) -> int:
    """Parse the options and run; what goes wrong for the user is one line.

    Args:
        run: gets the options, the command line, and when it started (``time.monotonic``).
    """
    started = time.monotonic()
    args = parser.parse_args(argv)
    try:
        return run(args, sys.argv[1:] if argv is None else argv, started)
    except ValueError as error:
        print(f"{module}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
