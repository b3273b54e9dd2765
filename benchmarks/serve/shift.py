# SPDX-License-Identifier: Apache-2.0
"""Serve a workload that shifts from code to chat to translation, with and without online calibration.

    python -m benchmarks.serve.shift --pair TARGET DRAFT --data DIR --prompts 16 --max-tokens 64 --out X.jsonl

Two engines that differ in `online_calibration` alone answer the same prompts in turns, from the same start. After every
group of prompts a row with tokens/s and what the engine says about its rule is written; X.png plots them. The engines'
state is the subject, so a run is not resumed. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.common import options
from benchmarks.common.engines import Engines
from benchmarks.common.methods import parse_method
from benchmarks.common.records import RawFile, Row, load_prompts, make_units, unit_id
from benchmarks.common.session import WARM_UP, encode
from benchmarks.serve.shift_plot import plot, summary

MODULE = "benchmarks.serve.shift"
CODE, CHAT = "humaneval", "mt_bench"
SENTENCES = ("gsm8k", "alpaca")
"""Sets whose sentences are to be translated."""
LANGUAGES = ("German", "French", "Spanish")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    summary_line = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=summary_line)
    options.add_options(parser, sets=False)
    parser.set_defaults(prompts=16, max_tokens=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--batch", type=int, default=1, help="prompts at once")
    parser.add_argument("--rule", default="cost_aware", help="another rule has no calibration to switch: one engine")
    parser.add_argument("--out", type=Path, required=True, help="X.jsonl; also writes X.png")
    parser.add_argument("--plot-only", action="store_true", help="draw X.png anew from X.jsonl")
    parser.add_argument("--force", action="store_true", help="replace an earlier run")
    return parser


def sentences(rows: Sequence[Row]) -> Iterator[str]:
    """Different plain sentences of 6 to 24 words out of some prompts."""
    seen = set()
    for row in rows:
        for sentence in re.split(r"(?<=[.!?])\s+", row["prompt"]):
            plain = re.fullmatch(r"[A-Z][\w ,;:'’$%.\-]*[.!?]", sentence)
            if plain and 6 <= len(sentence.split()) <= 24 and sentence not in seen:
                seen.add(sentence)
                yield sentence


def translations(rows: Sequence[Row], count: int) -> list[Row]:
    """Prompts that ask for a sentence's translation; ValueError if there are too few sentences."""
    found = list(islice(sentences(rows), count))
    if len(found) < count:
        raise ValueError(f"--prompts {count}: the sets {', '.join(SENTENCES)} hold only {len(found)} plain sentences")
    texts = [f"Translate into {LANGUAGES[i % len(LANGUAGES)]}: {sentence}" for i, sentence in enumerate(found)]
    return [{"id": f"translation-{i}", "set": "translation", "prompt": text} for i, text in enumerate(texts)]


def load_phases(folder: Path, count: int) -> dict[str, list[Row]]:
    """Name of each phase → its prompts, in the order they are served."""
    plain = load_prompts(folder, [CODE, CHAT], count)
    pool = load_prompts(folder, SENTENCES, count)
    mixed = [row for rows in zip(*pool.values(), strict=True) for row in rows]
    return {"code": plain[CODE], "chat": plain[CHAT], "translation": translations(mixed, count)}


def variants_of(rule: str) -> dict[str, dict[str, Any]]:
    """Name of each engine → what its method's options are besides the shared ones."""
    method = parse_method(rule)
    if method.options:
        raise ValueError(f"--rule {rule}: name the rule alone, e.g. cost_aware")
    chosen: dict[str, Any] = {"rule": method.name}
    if method.name != "cost_aware":
        return {method.name: chosen}
    return {"online": chosen | {"online_calibration": True}, "frozen": chosen | {"online_calibration": False}}


def serve(
    engines: Engines, phases: dict[str, list[Row]], variants: Sequence[str], args: argparse.Namespace
) -> Iterator[Row]:
    """One row a group of prompts and engine; the engines take turns in being first."""
    before = {}
    for name in variants:
        engines.answer(name, [engines.encode(WARM_UP)] * args.batch, args.warm_up_tokens, args.temperature, args.top_k)
        before[name] = reliability_of(engines.rpc(name, "specdecpp_stats", reset=True))
    answered = 0
    for phase, rows in phases.items():
        for turn, unit in enumerate(make_units({phase: rows}, args.batch)):
            prompts = encode(engines, unit, args)
            answered += len(unit)
            for name in variants if turn % 2 == 0 else variants[::-1]:
                result = engines.answer(name, prompts, args.max_tokens, args.temperature, args.top_k)
                stats = engines.rpc(name, "specdecpp_stats", reset=True)
                now = reliability_of(stats)
                yield {
                    "phase": phase,
                    "prompt": unit_id(unit),
                    "answered": answered,
                    "variant": name,
                    "seconds": round(result.seconds, 4),
                    "tokens": result.num_tokens,
                    **{key: stats[key] for key in ("rounds", "candidates", "accepted")},
                    "rho": stats.get("cost_aware", {}).get("admission", {}).get("rho"),
                    "reliability": {
                        key: [a - b for a, b in zip(now[key], before[name][key], strict=True)] for key in now
                    },
                    "ended": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                }
                before[name] = now


def reliability_of(stats: Row) -> dict[str, list[float]]:
    """The engine's sums since its start, one entry a bin of estimates; empty where its rule has no estimates."""
    found: dict[str, list[float]] = stats.get("cost_aware", {}).get("calibration", {}).get("reliability", {})
    return found


def main(argv: list[str] | None = None) -> int:
    """Command line: see the module's docstring."""
    stopped = "to draw what is there: the same command with --plot-only"
    return options.command(MODULE, make_parser(), _main, argv, stopped)


def _main(args: argparse.Namespace, argv: Sequence[str], started: float) -> int:
    if args.plot_only:
        raw = RawFile(args.out)
        if not raw.rows:
            raise ValueError(f"--out {args.out} holds no rows; leave out --plot-only to measure some")
    else:
        raw = _measure(args, argv)
    plot(raw.rows, f"{args.rule}, {raw.runs[-1]['settings']['pair']}", args.out.with_suffix(".png"))
    print(json.dumps(summary(raw.rows)))
    return 0


def _measure(args: argparse.Namespace, argv: Sequence[str]) -> RawFile:
    variants = variants_of(args.rule)
    phases = load_phases(args.data, args.prompts)
    if not 1 <= args.batch <= args.prompts:
        raise ValueError(f"--batch {args.batch} must be 1 to {args.prompts}, the prompts a phase")
    if args.out.exists() and not args.force:
        raise ValueError(f"--out {args.out} is there already; choose another name or pass --force")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    settings = options.engine_settings(args, args.batch)
    engines = Engines(settings, [])
    try:
        for name, chosen in variants.items():
            engines.start_engine(name, settings.speculative_config(**chosen))
        args.out.unlink(missing_ok=True)  # only now: an engine that does not start costs no earlier run
        raw = RawFile(args.out)
        shared = options.shared_settings(args) | {"temperature": args.temperature, "batch": args.batch}
        raw.start_run(shared, options.provenance(argv, MODULE, [parse_method(args.rule)]))
        for row in serve(engines, phases, list(variants), args):
            raw.add(row)
            rate = row["tokens"] / row["seconds"]
            print(f"{row['phase']:12} {row['prompt'][:32]:32} {row['variant']:12} {rate:6.2f} tok/s", flush=True)
    finally:
        engines.close()
    return raw


if __name__ == "__main__":
    sys.exit(main())
