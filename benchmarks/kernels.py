# SPDX-License-Identifier: Apache-2.0
"""Times each Triton kernel against its torch twin on a GPU, both replayed from CUDA graphs, as drafting runs them.

    python -m benchmarks.kernels --out benchmarks/results/gpu/kernels.jsonl [--batches 1 8 64]
    python -m benchmarks.kernels --check      # no GPU: the kernels' tests, under Triton's interpreter

Before it is timed, a kernel's outputs are compared with the twin's on the same GPU. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import provenance
from vllm_specdecpp.decision import tails
from vllm_specdecpp.decision.tail_params import CostAwareParams
from vllm_specdecpp.kernels.cost_aware_tail import cost_aware_tail
from vllm_specdecpp.kernels.logits_summary import logits_summary, logits_summary_torch, make_partials
from vllm_specdecpp.kernels.threshold_tail import threshold_tail

BATCHES = (1, 4, 16, 64, 256)
MAX_LENGTH, NUM_STOP = 12, 2
CALLS, REPLAYS = 50, 40
"""Launches in a graph, and replays of it that are timed: a replay's own launch is spread over its calls."""


@dataclass(frozen=True)
class Workload:
    """One kernel at one size."""

    kernel: str
    shape: str
    launch: Callable[[dict[str, Tensor]], None]
    twin: Callable[[dict[str, Tensor]], None]
    state: Callable[[], dict[str, Tensor]]
    """Makes what is read and written, always the same."""
    tolerance: float
    bytes_read: int = 0
    """Of logits; 0 where only latency counts."""


def workloads(batches: list[int], device: torch.device | str) -> Iterator[Workload]:
    """Sizes of real drafting, with Qwen's vocabulary."""
    for n in batches:
        yield _threshold(n, device)
        yield _cost_aware(n, device)
        for dtype in (torch.bfloat16, torch.float32):
            yield _logits(n, 151_936, dtype, device)


def _round_state(n: int, device: torch.device | str) -> dict[str, Tensor]:
    torch.manual_seed(n)
    on: dict[str, Any] = {"device": device}
    return {
        "scores": torch.rand(n, **on), "token_ids": torch.randint(0, 1000, (n,), **on), "survival": torch.ones(n, **on),
        "lengths": torch.zeros(n, dtype=torch.int32, **on), "running": torch.ones(n, dtype=torch.int32, **on),
        "stop_token_ids": torch.full((n, NUM_STOP), -1, **on), "draft_tokens": torch.zeros(n, MAX_LENGTH, **on).long(),
        "any_running": torch.zeros(1, dtype=torch.int32, **on),
    }  # fmt: skip


def _threshold(n: int, device: torch.device | str) -> Workload:
    def state() -> dict[str, Tensor]:
        max_lengths = torch.full((n,), MAX_LENGTH, dtype=torch.int32, device=device)
        return _round_state(n, device) | {"max_lengths": max_lengths, "threshold": torch.tensor([0.7], device=device)}

    def call(launch: Callable[..., None]) -> Callable[[dict[str, Tensor]], None]:
        return lambda tensors: launch(step=1, min_length=1, scored=True, **tensors)

    return Workload("threshold_tail", f"batch {n}", call(threshold_tail), call(tails.threshold_tail), state, 0.0)


def _cost_aware(n: int, device: torch.device | str) -> Workload:
    params = CostAwareParams.allocate(n, MAX_LENGTH, 1024, [0, 0, 1, 2, 3], device)

    def state() -> dict[str, Tensor]:
        params.load(
            limits=[MAX_LENGTH] * n, price=60.0 * n,
            this=[1, 0, 0, 0, 0, 0], next=[0.5, 0.4, 0, 0, 0, 0], means=[0.7] * 4,
            step_seconds=[0.002 + 1e-5 * i for i in range(n + 1)],
            verify_seconds=[0.02 + 1e-5 * i for i in range(1025)],
        )  # fmt: skip
        return _round_state(n, device) | {
            "expected": torch.zeros(n, device=device), "scores_log": torch.zeros(MAX_LENGTH, n, device=device),
            "widths": torch.zeros(MAX_LENGTH, dtype=torch.int32, device=device),
        }  # fmt: skip

    def call(launch: Callable[..., None]) -> Callable[[dict[str, Tensor]], None]:
        return lambda tensors: launch(step=1, params=params, **tensors)

    return Workload("cost_aware_tail", f"batch {n}", call(cost_aware_tail), call(tails.cost_aware_tail), state, 1e-4)


def _logits(n: int, vocab_size: int, dtype: torch.dtype, device: torch.device | str) -> Workload:
    def state() -> dict[str, Tensor]:
        torch.manual_seed(n)
        names = ("top1_prob", "entropy", "margin")
        return {
            "logits": (torch.randn(n, vocab_size, device=device) * 3).to(dtype),
            "argmax": torch.zeros(n, dtype=torch.int64, device=device),
            **{name: torch.zeros(n, device=device) for name in names},
        }  # fmt: skip

    partials = make_partials(n, vocab_size, device)

    def call(launch: Callable[..., None]) -> Callable[[dict[str, Tensor]], None]:
        return lambda tensors: launch(**tensors, partials=partials)

    shape = f"batch {n}, vocabulary {vocab_size}, {_name(dtype)}"
    read = n * vocab_size * dtype.itemsize
    return Workload("logits_summary", shape, call(logits_summary), call(logits_summary_torch), state, 1e-4, read)


def compare(workload: Workload) -> None:
    """One call of the kernel and of its twin, from the same state.

    Raises:
        AssertionError: they differ.
    """
    ours, theirs = workload.state(), workload.state()
    workload.launch(ours)
    workload.twin(theirs)
    for name in ours:
        same = torch.isclose(ours[name], theirs[name], workload.tolerance, workload.tolerance, equal_nan=True)
        assert bool(same.all()), f"{workload.kernel}, {workload.shape}: {name} differs from the twin's"


def microseconds(call: Callable[[dict[str, Tensor]], None], tensors: dict[str, Tensor]) -> list[float]:
    """Times of one call, replayed from a graph of CALLS: 20th, 50th and 80th percentile."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and lets cuBLAS choose
        for _ in range(3):
            call(tensors)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call(tensors)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPLAYS)]
    graph.replay()
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) * 1000 / CALLS for start, end in events]
    p20, _, _, p80 = statistics.quantiles(times, n=5)
    return [p20, statistics.median(times), p80]


def measure(workload: Workload) -> dict[str, Any]:
    """A row of the results."""
    compare(workload)
    ours = microseconds(workload.launch, workload.state())
    theirs = microseconds(workload.twin, workload.state())
    row: dict[str, Any] = {"kernel": workload.kernel, "shape": workload.shape, "us": ours, "twin_us": theirs}
    row["speedup"] = theirs[1] / ours[1]
    if workload.bytes_read:
        row["gigabytes_per_second"] = workload.bytes_read / ours[1] / 1000
    return row


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="run the kernels' tests under the interpreter instead")
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--out", type=Path, help="new .jsonl file for the rows")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.check:
        return subprocess.call([sys.executable, "-m", "pytest", "-q", "tests/v2/kernels"])
    if not torch.cuda.is_available() or torch.version.cuda is None:
        print("specdecpp: benchmarks.kernels times nothing without an NVIDIA GPU; --check tests the kernels on a CPU")
        return 0
    if args.out and args.out.exists():
        print(f"specdecpp: --out {args.out} is there already; name another file", file=sys.stderr)
        return 1
    origin = {
        "command": provenance.command_line(sys.argv[1:] if argv is None else argv, "benchmarks.kernels"),
        "git": provenance.git_state(), "versions": provenance.versions(), "gpu": torch.cuda.get_device_name(),
    }  # fmt: skip
    rows = []
    for workload in workloads(args.batches, "cuda"):
        row = measure(workload)
        rows.append(row)
        (_, ours, _), (_, theirs, _) = row["us"], row["twin_us"]
        print(f"{row['kernel']:16} {row['shape']:42} {ours:8.2f} us, twin {theirs:8.2f} us: {row['speedup']:.2f}x")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("".join(json.dumps(row | origin) + "\n" for row in rows), encoding="utf-8")
    slower = [f"{row['kernel']}, {row['shape']}" for row in rows if row["speedup"] < 1]
    print(json.dumps({"workloads": len(rows), "slower_than_twin": slower}))
    return 0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(main())
