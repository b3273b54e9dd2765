# SPDX-License-Identifier: Apache-2.0
"""Compile every kernel for a GPU that need not be there, and say what each takes.

    python -m vllm_specdecpp.kernels.report [--capability 90] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import cost_aware_tail, logits_summary, one_hot_rows, runs, suffix_cache, suffix_match, threshold_tail

# Pointers from torch's allocator are 16-byte aligned, and Triton's run time tells the compiler so.
_ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Variant:
    """A kernel as a launcher launches it."""

    name: str
    kernel: Any
    types: Mapping[str, str]
    """Argument to Triton type; an argument that is missing is an int32."""
    constants: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Usage:
    """What ptxas says of a kernel."""

    name: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    num_warps: int
    cubin_bytes: int


def variants() -> Iterator[Variant]:
    """Every kernel, at the sizes that its launcher chooses."""
    yield from _threshold_tail()
    yield from _cost_aware_tail()
    yield from _logits_summary()
    yield from _runs()


_ROUND = {
    "scores_ptr": "*fp32", "token_ids_ptr": "*i64", "survival_ptr": "*fp32", "lengths_ptr": "*i32",
    "running_ptr": "*i32", "stop_token_ids_ptr": "*i64", "draft_tokens_ptr": "*i64", "any_running_ptr": "*i32",
}  # fmt: skip
_DTYPES = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}


def _threshold_tail() -> Iterator[Variant]:
    kernel, types = threshold_tail._threshold_tail_kernel, {"max_lengths_ptr": "*i32", "threshold_ptr": "*fp32"}
    for scored, flag in ((True, "int32"), (True, "bool"), (False, "int32")):
        of_flag = {"any_running_ptr": "*i1" if flag == "bool" else "*i32"}
        yield Variant(
            f"threshold_tail, {flag} flag{'' if scored else ', not scored'}", kernel, _ROUND | types | of_flag,
            {"SCORED": scored, **threshold_tail.BLOCKS}, threshold_tail.OPTIONS,
        )  # fmt: skip


def _cost_aware_tail() -> Iterator[Variant]:
    module = cost_aware_tail
    whole = ("widths_ptr", "limits_ptr", "base_ptr")
    real = (
        "expected_ptr", "scores_log_ptr", "price_ptr", "slopes_ptr", "this_ptr", "next_ptr", "drift_ptr", "means_ptr",
        "step_seconds_ptr", "verify_seconds_ptr", "levels_ptr",
    )  # fmt: skip
    types = _ROUND | dict.fromkeys(whole, "*i32") | dict.fromkeys(real, "*fp32")
    for num_reqs in (1, 64, 128, 256, 512, module.MAX_REQS):
        for lag in (0, 1) if num_reqs in (1, 256) else (0,):
            yield Variant(
                f"cost_aware_tail, {num_reqs} requests, lag {lag}", module._cost_aware_tail_kernel, types,
                {"LAG": lag, **module.sizes(num_reqs)}, module.options(num_reqs),
            )  # fmt: skip


def _logits_summary() -> Iterator[Variant]:
    module, partials = logits_summary, {"partials_ptr": "*fp32"}
    for dtype, pointer in _DTYPES.items():
        constants = {"BLOCK_VOCAB": module.BLOCK_VOCAB}
        types = partials | {"logits_ptr": pointer}
        yield Variant(f"logits_summary, parts, {dtype}", module._part_kernel, types, constants, module.OPTIONS)
    outs = {"top1_prob_ptr": "*fp32", "entropy_ptr": "*fp32", "margin_ptr": "*fp32", "argmax_ptr": "*i64"}
    for vocab_size in (32_000, 151_936, 262_144):
        constants = {"BLOCK_PARTS": triton.next_power_of_2(module.num_parts(vocab_size))}
        name = f"logits_summary, combine, vocabulary {vocab_size}"
        yield Variant(name, module._combine_kernel, partials | outs, constants, module.COMBINE_OPTIONS)


def _runs() -> Iterator[Variant]:
    pointers = {
        "tokens_ptr": "*i32", "last_ptr": "*i64", "limits_ptr": "*i32", "starts_ptr": "*i64", "matches_ptr": "*i32",
    }  # fmt: skip
    kernel = suffix_match._suffix_match_kernel
    for states in ("i32", "i64"):
        types = pointers | {"states_ptr": f"*{states}"}
        yield Variant(f"suffix_match, {states} states", kernel, types, suffix_match.SIZES, suffix_match.OPTIONS)
        more = {"prompt_lens_ptr": "*i32", "total_lens_ptr": "*i32", "found_ptr": "*i64"}
        others = suffix_cache._match_others_kernel
        yield Variant(f"match_others, {states} states", others, types | more, suffix_cache.SIZES, suffix_cache.OPTIONS)
    real = (
        "run_odds_ptr", "run_shifts_ptr", "survival_ptr", "chances_ptr", "reach_ptr", "chance_ptr", "accept_ptr",
        "verify_seconds_ptr", "accepted_ptr", "expected_ptr", "scores_log_ptr", "slopes_ptr", "this_ptr", "means_ptr",
        "step_seconds_ptr", "first_seconds_ptr", "spent_ptr",
    )  # fmt: skip
    whole = (
        "run_ptr", "drafts_ptr", "drafted_ptr", "rows_ptr", "lengths_ptr", "max_lengths_ptr", "widths_ptr", "base_ptr",
    )  # fmt: skip
    long = "stop_token_ids_ptr", "order_ptr", "candidates_ptr", "draft_tokens_ptr", "ends_ptr"
    types = pointers | dict.fromkeys(real, "*fp32") | dict.fromkeys(whole, "*i32") | dict.fromkeys(long, "*i64")
    types |= {"states_ptr": "*i64"}
    for max_length in (10, 20):
        steps, blocks = runs.steps_of(max_length), runs.BLOCKS
        for behind, sums in ((False, "*fp32"), (True, "*fp64")):
            flags, name = {"BEHIND": behind, **steps}, f"{max_length} candidates{', behind' if behind else ''}"
            stop = {"BLOCK_STOP": blocks["BLOCK_STOP"]}
            yield Variant(f"run_chances, {name}", runs._run_chances_kernel, types, flags | stop, runs.OPTIONS)
            sizes = {"BLOCK_RANK": runs.BLOCK_RANK, "BLOCK_REQS": blocks["BLOCK_REQS"]}
            ours = types | {"tokens_ptr": sums}
            yield Variant(f"take_runs, {name}", runs._take_runs_kernel, ours, flags | sizes, runs.OPTIONS)
        ours = types | {"emitted_ptr": "*fp64"}
        name = f"behind_drafts, {max_length} candidates"
        yield Variant(name, runs._behind_drafts_kernel, ours, blocks | steps, runs.OPTIONS)
    for dtype, pointer in _DTYPES.items():
        types = {"logits_ptr": pointer, "states_ptr": "*i64", "candidates_ptr": "*i64"}
        kernel, constants = one_hot_rows._one_hot_rows_kernel, one_hot_rows.BLOCKS
        yield Variant(f"one_hot_rows, {dtype}", kernel, types, constants, one_hot_rows.OPTIONS)


def compile_variant(variant: Variant, capability: int) -> Usage:
    """Compile a kernel down to a cubin.

    Raises:
        RuntimeError: triton interprets kernels in this process.
    """
    kernel = variant.kernel
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError("kernels are interpreted in this process: unset TRITON_INTERPRET")
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in variant.constants else variant.types.get(name, "i32")
        if signature[name].startswith("*"):
            attributes[(index,)] = _ALIGNED
    source = ASTSource(kernel, signature, dict(variant.constants), attributes)
    log = io.StringIO()
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        triton.knobs.compilation.always_compile = True  # a cached kernel has no log
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(variant.options))
    (registers,) = re.findall(r"Used (\d+) registers", log.getvalue())
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log.getvalue())
    return Usage(
        variant.name, int(registers), sum(map(int, spills)), compiled.metadata.shared, compiled.metadata.num_warps,
        len(compiled.asm["cubin"]),
    )  # fmt: skip


def table(usages: list[Usage]) -> str:
    """The report as aligned text."""
    header = ("kernel", "registers", "spilled", "shared", "warps", "cubin")
    rows = [header, *(tuple(map(str, asdict(usage).values())) for usage in usages)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = []
    for name, *figures in rows:
        cells = [figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Print the table; exit status 1 if a kernel spills registers."""
    parser = argparse.ArgumentParser(prog="python -m vllm_specdecpp.kernels.report", description=__doc__)
    parser.add_argument("--capability", type=int, default=90, help="compute capability, e.g. 90 for an H100")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(argv)
    try:
        usages = [compile_variant(variant, args.capability) for variant in variants()]
    except RuntimeError as error:
        parser.error(str(error))
    print(f"sm_{args.capability}, triton {triton.__version__}; bytes but for registers (per thread), warps")
    print(table(usages))
    if args.json:
        args.json.write_text(json.dumps([asdict(usage) for usage in usages], indent=1) + "\n", encoding="utf-8")
    return int(any(usage.spill_bytes for usage in usages))


if __name__ == "__main__":
    sys.exit(main())
