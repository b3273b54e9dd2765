# SPDX-License-Identifier: Apache-2.0
"""Times starts of an engine: vLLM alone, its own ``draft_model``, the plugin's first start and its second.

    python -m benchmarks.start --pair TARGET DRAFT --out benchmarks/results/X.jsonl [--repeats 3]

Each start is a process of its own, from ``LLM(...)`` to its return; the kinds take turns. Run it again to go on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import provenance

KINDS = ("vLLM alone", "vLLM's draft_model", "specdecpp, first start", "specdecpp, second start")


def start(kind: str, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of one start in this process."""
    from vllm import LLM

    target, draft = args.pair
    method = {"vLLM alone": None, "vLLM's draft_model": "draft_model"}.get(kind, "specdecpp")
    config: dict[str, Any] | None = None if method is None else {"method": method, "model": draft}
    if method == "draft_model":
        assert config is not None
        config["num_speculative_tokens"] = 4
    before = time.perf_counter()
    llm = LLM(
        target,
        speculative_config=config,
        enforce_eager=args.eager,
        max_model_len=args.max_model_len,
        kv_cache_memory_bytes=args.kv_cache_mib << 20,
        dtype=args.dtype,
    )
    seconds = time.perf_counter() - before
    # The costs are kept once some rounds were seen.
    llm.generate(["def first(items):", "Once upon a time"], _greedy(), use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    return {"seconds": seconds}


def _greedy() -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", nargs=2, required=True, metavar=("TARGET", "DRAFT"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="without torch.compile and CUDA graphs")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--kv-cache-mib", type=int, default=512)
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one is not None:
        print("\n" + json.dumps(start(args.one, args)))
        return
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    header = {"command": provenance.command_line(argv, "benchmarks.start"), "git": provenance.git_state()}
    done = {(row["kind"], row["repeat"]) for row in rows}
    left = [repeat for repeat in range(args.repeats) if not {(kind, repeat) for kind in KINDS} <= done]
    plan = [(kind, repeat) for repeat in left for kind in KINDS]
    with tempfile.TemporaryDirectory() as cache:  # the second start finds what the first one has kept
        for kind, repeat in [(KINDS[0], -1), *plan] if plan else []:  # vLLM's own caches are warm in all that count
            if kind == KINDS[2]:
                shutil.rmtree(Path(cache) / "specdecpp", ignore_errors=True)
            command = [sys.executable, "-m", "benchmarks.start", *argv, "--one", kind]
            environment = os.environ | {"VLLM_CACHE_ROOT": cache}
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True).stdout
            if repeat >= 0:
                rows.append({"kind": kind, "repeat": repeat, **json.loads(output.splitlines()[-1]), **header})
                with args.out.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    least = statistics.median(r["seconds"] for r in rows if r["kind"] == KINDS[0])
    print("| start | seconds, median (range) | more than vLLM alone |\n|---|---|---|")
    for kind in KINDS:
        seconds = [r["seconds"] for r in rows if r["kind"] == kind]
        middle = statistics.median(seconds)
        print(f"| {kind} | {middle:.1f} ({min(seconds):.1f} to {max(seconds):.1f}) | {middle - least:+.1f} s |")


if __name__ == "__main__":
    main(sys.argv[1:])
