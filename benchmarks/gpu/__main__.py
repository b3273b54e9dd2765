# SPDX-License-Identifier: Apache-2.0
"""All that needs a GPU and vLLM: the GPU tests, and draft rounds by how they run.

    python -m benchmarks.gpu                       # everything, about an hour on one H100
    python -m benchmarks.gpu --parts tests rounds --shapes 0.5B --batches 1 8

Results go to ``benchmarks/results/gpu/``: ``results.json`` and a plot for each part. **Unproven**: no GPU has run it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import provenance
from benchmarks.gpu import jobs, plots
from benchmarks.gpu.shapes import DRAFTS

RESULTS = Path("benchmarks/results/gpu")
PARTS = ("tests", "rounds")


def no_gpu() -> str | None:
    """Why nothing can be measured here, or None."""
    import torch

    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "specdecpp: benchmarks.gpu needs an NVIDIA GPU and a CUDA build of torch; there is none on this machine"
    return None


def run_job(job: dict[str, Any], timeout: float) -> dict[str, Any]:
    """A job's row: its description with ``rows``, or with ``error``, the last line of what went wrong."""
    described: dict[str, Any] = {key: job[key] for key in ("draft", "way")}
    command = [sys.executable, "-m", "benchmarks.gpu.measure", json.dumps(job)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {**described, "error": f"no result within {timeout:.0f} s"}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {**described, "error": lines[-1] if lines else f"exit status {done.returncode}"}
    return {**described, **json.loads(done.stdout.splitlines()[-1])}


def run_tests() -> dict[str, Any]:
    """The GPU-marked tests; their summary line."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return {"passed": done.returncode == 0, "summary": (done.stdout.splitlines() or [""])[-1]}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shapes", nargs="+", choices=list(DRAFTS), default=list(DRAFTS), help="drafts to time")
    parser.add_argument("--batches", nargs="+", type=int, default=jobs.BATCHES)
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one engine")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder; must not hold results yet")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    if (reason := no_gpu()) is not None:
        print(reason, file=sys.stderr)
        return 1
    path = args.results / "results.json"
    if path.exists():
        print(f"specdecpp: --results {args.results} holds results already; name another folder", file=sys.stderr)
        return 1
    results: dict[str, Any] = {
        "command": provenance.command_line(argv, "benchmarks.gpu"), "git": provenance.git_state(),
        "versions": provenance.versions(), "rows": [],
    }  # fmt: skip
    if "tests" in args.parts:
        results["tests"] = run_tests()
        print(results["tests"]["summary"], flush=True)
    if "rounds" in args.parts:
        with tempfile.TemporaryDirectory() as scratch:
            for job in jobs.draft_round_jobs(Path(scratch), args.shapes, args.batches):
                row = run_job(job, args.timeout)
                results["rows"].append(row)
                print(json.dumps(row), flush=True)
    args.results.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    plots.write(results["rows"], args.results)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
