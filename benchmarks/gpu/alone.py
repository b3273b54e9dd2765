# SPDX-License-Identifier: Apache-2.0
"""What a GPU machine can show in minutes with torch and Triton alone, no vLLM and no downloads.

    python -m benchmarks.gpu.alone                    # the kernel tests, then draft rounds by how they run
    python -m benchmarks.gpu.alone --seconds 60 --layers 4 --results elsewhere

Rounds of a hand-written draft of random weights: each way to run them, K of 5 and 20, ended by the device after 1, 4 or
20 candidates, at batch sizes 1, 8 and 64; seconds a round, host waits in it, and calls queued outside the graphs.
``alone.json`` and ``alone.png`` go to the results folder. Without a GPU it runs to its end as well, on a small draft
with functions in the place of graphs: a rehearsal, whose times and waits say nothing. **Unproven**: no GPU has run it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.shapes import DRAFTS, VOCAB, Shape
from vllm_specdecpp.engine.v2.graphs import EAGER, IF_NODES, PER_PASS, CudaBackend, DraftGraphs

CELLS = [(length, stop) for length in (5, 20) for stop in (1, 4, 20) if stop <= length]
BATCHES = (1, 8, 64)
REPEATS = 20
SMALL = Shape(64, 128, 2, 4, 2)
"""The rehearsal's draft."""


class Calls(TorchDispatchMode):
    """Counts aten calls, and those of them that bring a number to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.num = self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += 1
        self.waits += func._schema.name in ("aten::is_nonzero", "aten::item", "aten::_local_scalar_dense")
        return func(*args, **(kwargs or {}))


def modes(device: torch.device) -> Iterator[tuple[str, str | None]]:
    """(way to run a round, why it cannot be tried here)."""
    yield EAGER, None
    yield PER_PASS, None
    lacks = device.type == "cuda" and not hasattr(torch.cuda.CUDAGraph, "begin_capture_to_if_node")
    yield IF_NODES, "this torch has no CUDAGraph.begin_capture_to_if_node (2.13 has)" if lacks else None


def make(rounds: Any, mode: str, batches: list[int], device: torch.device) -> DraftGraphs | None:
    """Captured rounds, on the current stream; None for the eager way."""
    from benchmarks.gpu.static_draft import HostBackend, HostGraphs

    if mode == EAGER:
        return None
    graphs: DraftGraphs
    if device.type == "cuda":
        backend = CudaBackend(device)
        if mode == IF_NODES:
            backend.probe()
        graphs = DraftGraphs(rounds, mode, batches, rounds.length, backend)
    else:
        graphs = HostGraphs(rounds, mode, batches, rounds.length, HostBackend())  # type: ignore[arg-type]
    graphs.capture()
    return graphs


def time_cell(rounds: Any, graphs: DraftGraphs | None, batch: int, stop: int) -> dict[str, Any]:
    """One row: seconds of a round, host waits, calls outside the graphs, and whether it drafted what it should."""
    device = rounds.any_running.device

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def run() -> None:
        rounds.begin(batch)
        if graphs is None:
            rounds.eager(batch)
        else:
            graphs.replay(batch, rounds.length)

    seconds = []
    for _ in range(REPEATS if device.type == "cuda" else 2):
        wait()
        start = time.perf_counter()
        run()
        wait()
        seconds.append(time.perf_counter() - start)
    lengths = set(rounds.round.lengths[:batch].tolist())
    with Calls() as outside:
        rounds.begin(batch)
    with Calls() as whole:
        run()
    return {
        "batch": batch, "seconds": statistics.median(seconds[1:]), "calls_outside": outside.num,
        "host_waits": whole.waits, "right": lengths == {stop},
    }  # fmt: skip


def measure(args: argparse.Namespace, device: torch.device, deadline: float) -> Iterator[dict[str, Any]]:
    """A row a way, K, stop and batch, until the time is up."""
    from benchmarks.gpu.static_draft import StaticDraft, StaticRounds

    on_gpu = device.type == "cuda"
    shape = Shape(**{**DRAFTS["1B"].__dict__, "layers": args.layers}) if on_gpu else SMALL
    batches = list(BATCHES) if on_gpu else [1, 2]
    draft = StaticDraft(
        shape, VOCAB if on_gpu else 512, max(batches), 256, torch.bfloat16 if on_gpu else torch.float32, device
    )
    for mode, refused in modes(device):
        for length, stop in CELLS:
            row: dict[str, Any] = {"mode": mode, "length": length, "stop": stop}
            if refused is None and time.monotonic() > deadline:
                refused = "the time was up"
            if refused is not None:
                yield {**row, "error": refused}
                continue
            rounds = StaticRounds(draft, max(batches), length, stop)
            try:
                graphs = make(rounds, mode, batches, device)
            except RuntimeError as error:
                yield {**row, "error": " ".join(str(error).split())}
                continue
            for batch in batches:
                yield {**row, **time_cell(rounds, graphs, batch, stop)}


def kernel_tests() -> dict[str, Any]:
    """The kernels' own tests, compiled; their summary line."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu/test_kernels.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return {"passed": done.returncode in (0, 5), "summary": (done.stdout.splitlines() or [""])[-1]}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Milliseconds a round over the batch size: a line a way, a field a K and stop."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, fields = pyplot.subplots(1, len(CELLS), figsize=(3 * len(CELLS), 3), squeeze=False)
    for axes, (length, stop) in zip(fields[0], CELLS, strict=True):
        for mode in (EAGER, PER_PASS, IF_NODES):
            mine = [r for r in rows if (r["mode"], r["length"], r["stop"]) == (mode, length, stop) and "seconds" in r]
            axes.plot([r["batch"] for r in mine], [1e3 * r["seconds"] for r in mine], marker="o", label=mode)
        axes.set(xlabel="batch size", ylabel="ms", title=f"K={length}, ends after {stop}")
    fields[0][0].legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.alone", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=420.0, help="no further cell is begun after this time")
    parser.add_argument("--layers", type=int, default=16, help="of the draft, whose widths are a 1B Llama's")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/gpu"))
    args = parser.parse_args(argv)
    deadline = time.monotonic() + args.seconds
    on_gpu = torch.cuda.is_available() and torch.version.cuda is not None
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    if not on_gpu:
        from tests.v2 import interpreted_triton

        interpreted_triton.install()  # before the kernels are imported
    what = torch.cuda.get_device_name(device) if on_gpu else "no GPU: a rehearsal, its times say nothing"
    results: dict[str, Any] = {"device": what, "torch": torch.__version__, "kernel_tests": kernel_tests(), "rows": []}
    print(what, results["kernel_tests"]["summary"], sep="\n", flush=True)
    stream = torch.cuda.stream(torch.cuda.Stream(device)) if on_gpu else torch.inference_mode()
    with stream, torch.inference_mode():
        for row in measure(args, device, deadline):
            results["rows"].append(row)
            print(json.dumps(row), flush=True)
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / "alone.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    plot(results["rows"], path.with_suffix(".png"))
    print(path)
    right = all(row.get("right", True) for row in results["rows"])
    return 0 if right and results["kernel_tests"]["passed"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
