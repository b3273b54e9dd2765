# SPDX-License-Identifier: Apache-2.0
"""Measure speculation off, vLLM's draft_model and specdecpp's rules on the same prompts, interleaved in one run.

    python -m benchmarks.run --pair TARGET DRAFT --data DIR --sets alpaca gsm8k humaneval mt_bench --prompts 20 \
        --methods off draft_model:2 draft_model:4 draft_model:6 draft_model:8 confidence entropy \
        --out benchmarks/results/X.jsonl

Each prompt is answered by all methods in a rotated order before the next prompt's turn. Raw rows are appended to
X.raw.jsonl as they are measured: run the same command again to go on after an interruption.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.engines import Engines, EngineSettings
from benchmarks.methods import OFF, Method, parse_methods, rotated
from benchmarks.provenance import command_line, git_state, model_label, versions
from benchmarks.records import RawFile, Row, load_prompts, make_units, output_hash, unit_id
from benchmarks.report import write_report
from vllm_specdecpp.models import SOURCES, fetch
from vllm_specdecpp.packaged_gguf import FetchError

Plan = tuple[list[Row], list[Method]]
WARM_UP = "Write a short story about a lighthouse keeper who learns to count to one hundred."


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=summary)
    parser.add_argument(
        "--pair",
        nargs=2,
        required=True,
        metavar=("TARGET", "DRAFT"),
        help="hub ids, folders, or names that vllm_specdecpp.models fetches",
    )
    parser.add_argument("--head", help="acceptance head: folder or hub id (rule threshold)")
    parser.add_argument("--data", type=Path, required=True, help="folder with eval_SET.jsonl")
    parser.add_argument("--sets", nargs="+", default=["alpaca", "gsm8k", "humaneval", "mt_bench"])
    parser.add_argument("--prompts", type=int, default=20, help="prompts a set")
    parser.add_argument("--max-tokens", type=int, default=128, help="new tokens a prompt")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-k", type=int, help="sample among the target's k likeliest tokens; the paper's is 50")
    parser.add_argument(
        "--draft-sample-method",
        choices=["greedy", "probabilistic"],
        help="vLLM's option: how candidates are drawn at temperature > 0",
    )
    parser.add_argument("--batch", type=int, default=1, help="prompts at once; one set at a time")
    parser.add_argument("--methods", nargs="+", required=True, help="off, draft_model:K, rule[:option=value,...]")
    parser.add_argument("--max-candidates", type=int, default=20, help="num_speculative_tokens of the engine")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--kv-cache-mib", type=int, default=512, help="KV cache of each engine")
    parser.add_argument("--warm-up-tokens", type=int, default=24, help="unmeasured tokens of each method at the start")
    parser.add_argument("--eager", action="store_true", help="no torch.compile: starts faster, runs slower")
    parser.add_argument("--minutes", type=float, help="stop before the prompt that would end later than this")
    parser.add_argument("--out", type=Path, required=True, help="X.jsonl; also writes X.raw.jsonl, X.md, X.png")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True, help="go on with X.raw.jsonl")
    parser.add_argument("--force", action="store_true", help="replace a finished report (raw rows are always kept)")
    return parser


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


def settings_of(args: argparse.Namespace) -> Row:
    """What must be the same for rows to be comparable; methods and the number of prompts may grow."""
    return {
        "pair": " + ".join(model_label(name) for name in args.pair),
        "head": model_label(args.head) if args.head else None,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "draft_sample_method": args.draft_sample_method,
        "batch": args.batch,
        "max_tokens": args.max_tokens,
        "max_candidates": args.max_candidates,
        "eager": args.eager,
    }


class Progress:
    """Prints one line a measurement with the time that is left."""

    def __init__(self, todo: list[Method], measured: list[Row]):
        self._left = todo
        self._seconds: dict[str, list[float]] = {}
        for row in measured:
            self._seconds.setdefault(row["method"], []).append(row["seconds"])

    def expected(self, methods: list[Method]) -> float:
        """Seconds that these methods' next measurements will take, from those measured so far."""
        known = [second for seconds in self._seconds.values() for second in seconds]
        mean = sum(known) / len(known) if known else 0.0
        return sum(sum(s) / len(s) if (s := self._seconds.get(m.label)) else mean for m in methods)

    def done(self, method: Method, row: Row) -> str:
        """Note one measurement; returns the line to print."""
        self._left.remove(method)
        self._seconds.setdefault(method.label, []).append(row["seconds"])
        length = f"K {row['candidates'] / row['rounds']:.1f}" if row["rounds"] else ""
        rate = row["tokens"] / row["seconds"]
        return (
            f"{row['prompt'][:32]:32} {method.label[:40]:40} {rate:6.2f} tok/s {length:8} "
            f"{len(self._left)} left, {self.expected(self._left) / 60:.0f} min"
        )


def measure(engines: Engines, unit: list[Row], method: Method, args: argparse.Namespace, off: str | None) -> Row:
    """One raw row: ``equals_off`` is None for ``off``, where off has not run yet, and where tokens are sampled."""
    prompts = [engines.encode(prompt["prompt"]) for prompt in unit]
    longest = max(map(len, prompts)) + args.max_tokens + args.max_candidates
    if longest > args.max_model_len:
        parts = "prompt, new tokens, candidates"
        raise ValueError(f"--max-model-len {args.max_model_len}: {unit_id(unit)} needs {longest} ({parts}); raise it")
    result = engines.generate(method, prompts, args.max_tokens, args.temperature, args.top_k)
    output = output_hash(result.token_ids)
    return {
        "prompt": unit_id(unit),
        "set": unit[0]["set"],
        "method": method.label,
        "seconds": round(result.seconds, 4),
        "tokens": result.num_tokens,
        **result.counters,
        "output": output,
        "equals_off": None if method.name == OFF or off is None or args.temperature > 0 else output == off,
        "ended": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def make_plan(units: list[list[Row]], methods: list[Method], done: set[tuple[str, str]]) -> list[Plan]:
    """The units that are not finished, each with its missing methods in this unit's order."""
    plan = []
    for turn, unit in enumerate(units):
        order = [method for method in rotated(methods, turn) if (unit_id(unit), method.label) not in done]
        if order:
            plan.append((unit, order))
    return plan


def run_plan(
    engines: Engines, raw: RawFile, plan: list[Plan], methods: list[Method], args: argparse.Namespace, started: float
) -> bool:
    """Measure what is missing; returns False if the time budget ended it early."""
    progress = Progress([method for _, order in plan for method in order], raw.rows)
    for method in methods:
        print(f"warm-up: {method.label}", flush=True)
        warm_up = [engines.encode(WARM_UP)] * args.batch
        engines.generate(method, warm_up, args.warm_up_tokens, args.temperature, args.top_k)
    for unit, order in plan:
        if args.minutes is not None and time.monotonic() - started + progress.expected(order) > 60 * args.minutes:
            return False
        off = next((r["output"] for r in raw.rows if r["prompt"] == unit_id(unit) and r["method"] == OFF), None)
        for method in order:
            row = measure(engines, unit, method, args, off)
            raw.add({**row, "measured_in": raw.runs[-1]["run"]})
            off = row["output"] if method.name == OFF else off
            print(progress.done(method, row), flush=True)
    return True


def main(argv: list[str] | None = None) -> int:
    """Command line: see the module's docstring."""
    started = time.monotonic()
    args = make_parser().parse_args(argv)
    try:
        return _main(args, sys.argv[1:] if argv is None else argv, started)
    except (ValueError, FetchError) as error:
        print(f"benchmarks.run: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on with {args.out.with_suffix('.raw.jsonl')}", file=sys.stderr)
        return 130


def _main(args: argparse.Namespace, argv: list[str], started: float) -> int:
    methods = parse_methods(args.methods)
    raw_path = check_paths(args)
    units = make_units(load_prompts(args.data, args.sets, args.prompts), args.batch)
    raw = RawFile(raw_path)
    provenance: dict[str, Any] = {
        "methods": [method.label for method in methods],
        "command": command_line(argv, "benchmarks.run"),
        "versions": versions(),
        "git": git_state(),
    }
    raw.start_run(settings_of(args), provenance)
    plan = make_plan(units, methods, raw.done())
    missing = sum(len(order) for _, order in plan)
    print(
        f"{missing} measurements to do: {len(methods)} methods, {len(units)} units of {args.batch} prompt(s)",
        flush=True,
    )
    finished = not plan
    if plan:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        target, draft = (str(fetch(name)) if name in SOURCES else name for name in args.pair)
        engines = Engines(
            EngineSettings(
                target=target,
                draft=draft,
                head=args.head,
                draft_sample_method=args.draft_sample_method,
                num_speculative_tokens=args.max_candidates,
                batch=args.batch,
                max_model_len=args.max_model_len,
                kv_cache_bytes=args.kv_cache_mib << 20,
                eager=args.eager,
            ),
            methods,
        )
        try:
            engines.start()
            finished = run_plan(engines, raw, plan, methods, args, started)
        finally:
            engines.close()
    if not finished:
        print("time is up; the same command goes on. To report what is there:")
        print(f"  python -m benchmarks.report {raw_path} --out {args.out}")
        return 0
    print(write_report(raw, args.out, args.force))
    return 0


if __name__ == "__main__":
    sys.exit(main())
