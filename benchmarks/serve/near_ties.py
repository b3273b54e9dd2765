# SPDX-License-Identifier: Apache-2.0
"""Show why a greedy output differs from speculation off: the target's logits at the first token that differs.

    python -m benchmarks.serve.near_ties benchmarks/results/X.raw.jsonl --pair TARGET DRAFT --data DIR \
        --method confidence --out benchmarks/results/X-near-ties.md

Generates the prompts that differ again, checks that the output is the one that was measured, and reads the common
prefix once more with Hugging Face, one row at a time as speculation off does. Verifying several rows at once rounds
bfloat16 differently; that can only turn the choice where two logits lie within a few bfloat16 spacings.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.engines import Engines, EngineSettings
from benchmarks.common.methods import OFF, Method, parse_method
from benchmarks.common.provenance import command_line, git_state, versions
from benchmarks.common.records import RawFile, load_prompts, output_hash
from benchmarks.models.fetch import fetched

TIE_SPACINGS = 4
"""A near-tie: at most this many bfloat16 spacings apart, as in tests/engine/test_real_pair.py."""


@dataclass(frozen=True)
class Place:
    """The first token that differs in one prompt's two outputs."""

    prompt: str
    prefix: list[int]  # prompt and common output
    position: int  # of the token in the output, from 0
    off: int
    other: int


@dataclass(frozen=True)
class Gap:
    """The target's view of a place."""

    place: Place
    off_below: float  # how far the token of speculation off lies below the largest logit
    other_below: float
    spacing: float  # of bfloat16 numbers at the largest logit

    @property
    def near_tie(self) -> bool:
        """Whether both tokens are within ``TIE_SPACINGS`` of the largest logit."""
        return max(self.off_below, self.other_below) <= TIE_SPACINGS * self.spacing


def differing(raw: RawFile, method: Method) -> list[str]:
    """Prompts whose output is not that of speculation off; ValueError where there is nothing to compare."""
    if raw.runs and raw.runs[-1]["settings"]["batch"] != 1:
        raise ValueError(f"{raw.path}: only runs of batch 1 can be looked at")
    outputs = {(row["prompt"], row["method"]): row["output"] for row in raw.rows}
    both = [prompt for prompt, name in outputs if name == method.label and (prompt, OFF) in outputs]
    if not both:
        raise ValueError(f"{raw.path} has no prompt with both {OFF!r} and {method.label!r}")
    return [prompt for prompt in both if outputs[prompt, OFF] != outputs[prompt, method.label]]


def first_difference(prompt: str, encoded: Sequence[int], off: Sequence[int], other: Sequence[int]) -> Place | None:
    """Where the two outputs part; None if they are equal or one only ends earlier."""
    for position, (a, b) in enumerate(zip(off, other, strict=False)):
        if a != b:
            return Place(prompt, [*encoded, *off[:position]], position, a, b)
    return None


def bfloat16_spacing(value: float) -> float:
    """Distance of neighbouring bfloat16 numbers (8 significant bits) at ``value``."""
    return 2.0 ** (math.frexp(abs(value))[1] - 8)


def generate(args: argparse.Namespace, raw: RawFile, names: list[str], method: Method) -> list[Place]:
    """Both outputs of each prompt, with the engines of the benchmark."""
    settings = raw.runs[-1]["settings"]
    rows = {row["id"]: row for prompts in load_prompts(args.data, args.sets, args.prompts).values() for row in prompts}
    wanted = {(row["prompt"], row["method"]): row["output"] for row in raw.rows}
    target, draft = map(fetched, args.pair)
    engines = Engines(
        EngineSettings(
            target=target,
            draft=draft,
            num_speculative_tokens=settings["max_candidates"],
            eager=settings["eager"],
        ),
        [Method(OFF), method],
    )
    places = []
    try:
        engines.start()
        for name in names:
            encoded = engines.encode(rows[name]["prompt"])
            outputs = {}
            for each in (Method(OFF), method):
                ids = engines.generate(each, [encoded], settings["max_tokens"], 0.0).token_ids
                same = output_hash(ids) == wanted[name, each.label]
                print(
                    f"{name} {each.label}: {'as measured' if same else 'not the output that was measured'}", flush=True
                )
                outputs[each.name] = ids[0]
            place = first_difference(name, encoded, outputs[OFF], outputs[method.name])
            places += [place] if place else []
    finally:
        engines.close()
    return places


def gaps(target: str, places: list[Place]) -> list[Gap]:
    """The target's bfloat16 logits at each place, from Hugging Face."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16).eval()
    found = []
    with torch.inference_mode():
        for place in places:
            cache = model(torch.tensor([place.prefix[:-1]]), use_cache=True).past_key_values
            step = model(torch.tensor([place.prefix[-1:]]), past_key_values=cache)
            logits = step.logits[0, -1].float()  # [vocab_size]
            top = float(logits.max())
            found.append(
                Gap(place, top - float(logits[place.off]), top - float(logits[place.other]), bfloat16_spacing(top))
            )
    return found


def report(found: list[Gap], num_compared: int, num_different: int, method: Method, command: str) -> str:
    """The Markdown page."""
    ties = sum(gap.near_tie for gap in found)
    lines = [
        f"# Where `{method.label}` words something differently from speculation off",
        "",
        f"{num_different} of {num_compared} greedy outputs differ; generated again, {len(found)} differ, and {ties} of",
        f"these part at a near-tie: both tokens within {TIE_SPACINGS} bfloat16 spacings of the target's largest logit",
        "(Hugging Face, bfloat16, one row at a time).",
        "",
        "| prompt | output token | off's token, below the top | the other, below the top | spacing | near-tie |",
        "|---|---|---|---|---|---|",
    ]
    for gap in found:
        place = gap.place
        lines.append(
            f"| {place.prompt} | {place.position} | {place.off}, {gap.off_below:.4f} | {place.other}, "
            f"{gap.other_below:.4f} | {gap.spacing:.4f} | {'yes' if gap.near_tie else '**no**'} |"
        )
    known = ", ".join(f"{name} {version}" for name, version in versions().items())
    return "\n".join([*lines, "", f"`{command}`", "", f"{known}; git {git_state()}", ""])


def main(argv: list[str] | None = None) -> int:
    """Command line: see the module's docstring. Exit status 1 if a difference is no near-tie."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve.near_ties", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("raw", type=Path, help="X.raw.jsonl of benchmarks.serve.run, temperature 0, batch 1")
    parser.add_argument("--pair", nargs=2, required=True, metavar=("TARGET", "DRAFT"))
    parser.add_argument("--data", type=Path, required=True, help="folder with eval_SET.jsonl")
    parser.add_argument("--sets", nargs="+", default=["alpaca", "gsm8k", "humaneval", "mt_bench"])
    parser.add_argument("--prompts", type=int, default=20, help="prompts a set, as in the run")
    parser.add_argument("--method", default="confidence", help="the method to compare with speculation off")
    parser.add_argument("--out", type=Path, required=True, help="Markdown page")
    parser.add_argument("--force", action="store_true", help="replace the page")
    args = parser.parse_args(argv)
    try:
        if args.out.exists() and not args.force:
            raise ValueError(f"--out {args.out} is there already; choose another name or pass --force")
        if not args.raw.exists():
            raise ValueError(f"{args.raw} is missing; give the .raw.jsonl of a benchmark")
        raw, method = RawFile(args.raw), parse_method(args.method)
        names = differing(raw, method)
        compared = sum(row["method"] == method.label for row in raw.rows)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        print(f"{len(names)} of {compared} outputs differ", flush=True)
        places = generate(args, raw, names, method) if names else []
        found = gaps(fetched(args.pair[0]), places) if places else []
    except ValueError as error:
        print(f"benchmarks.serve.near_ties: {error}", file=sys.stderr)
        return 2
    command = command_line(sys.argv[1:] if argv is None else argv, "benchmarks.serve.near_ties")
    page = report(found, compared, len(names), method, command)
    args.out.write_text(page, encoding="utf-8")
    print(page)
    return 0 if all(gap.near_tie for gap in found) else 1


if __name__ == "__main__":
    sys.exit(main())
