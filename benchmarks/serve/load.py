# SPDX-License-Identifier: Apache-2.0
"""Two servers under the same open-loop load, in turns: speculation off and specdecpp, asked by `vllm bench serve`.

    python -m benchmarks.serve.load --pair TARGET DRAFT --data DIR --rates 0.1 0.2 0.4 --prompts 16 --turns 2 \
        --out benchmarks/results/X.jsonl

Requests arrive by Poisson's law, of all sets mixed in random order; both servers get the same ones at the same times.
In the first turn specdecpp has served nothing yet. Raw rows are appended to X.raw.jsonl: run the same command again to
go on, with servers that start anew.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.common import options
from benchmarks.common.methods import OFF
from benchmarks.common.provenance import origin
from benchmarks.common.records import RawFile, Row, load_prompts, write_files

MODULE = "benchmarks.serve.load"
OURS = "specdecpp"
START_SECONDS = 600
FIGURES = {
    "output_throughput": "tokens/s", "p50_ttft_ms": "TTFT p50, ms", "p99_ttft_ms": "TTFT p99, ms",
    "p50_tpot_ms": "TPOT p50, ms", "p99_tpot_ms": "TPOT p99, ms",
}  # fmt: skip
"""Keys of what `vllm bench serve` saves, and their names in the table."""


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=summary)
    parser.add_argument(
        "--pair",
        nargs=2,
        required=True,
        metavar=("TARGET", "DRAFT"),
        help="hub ids, folders, or names that benchmarks.models.fetch knows",
    )
    parser.add_argument("--head", help="acceptance head: folder or hub id (rule threshold)")
    parser.add_argument("--data", type=Path, required=True, help="folder with eval_SET.jsonl")
    parser.add_argument("--sets", nargs="+", default=["alpaca", "gsm8k", "humaneval", "mt_bench"])
    parser.add_argument("--prompts", type=int, default=16, help="requests a load")
    parser.add_argument("--max-tokens", type=int, default=64, help="new tokens a request")
    parser.add_argument("--max-candidates", type=int, default=20, help="num_speculative_tokens of the engine")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--kv-cache-mib", type=int, default=512, help="KV cache of each engine")
    parser.add_argument("--eager", action="store_true", help="no torch.compile: starts faster, runs slower")
    parser.set_defaults(top_k=None, draft_sample_method=None)  # temperature 0
    parser.add_argument("--rates", nargs="+", type=float, required=True, help="requests a second")
    parser.add_argument("--turns", type=int, default=2, help="loads of --prompts requests at each rate")
    parser.add_argument("--max-num-seqs", type=int, default=16, help="of both servers")
    options.add_resume_options(parser)
    return parser


@contextmanager
def server(settings: Any, speculative: dict[str, Any] | None, log: Path) -> Iterator[str]:
    """A `vllm serve` on loopback: its base URL. It is ended with all its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", settings.target, "--served-model-name", "model",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16", "--no-enable-prefix-caching",
        "--max-model-len", str(settings.max_model_len), "--max-num-seqs", str(settings.batch),
        "--kv-cache-memory-bytes", str(settings.kv_cache_bytes), *(["--enforce-eager"] if settings.eager else []),
        *(["--speculative-config", json.dumps(speculative)] if speculative else []),
    ]  # fmt: skip
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_SECONDS
        while not _answers(f"{url}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise ValueError(f"the server did not start; its last lines:\n{log.read_text()[-2000:]}")
            time.sleep(1)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def ask(url: str, tokenizer: str, prompts: Sequence[Row], rate: float, max_tokens: int, seed: int) -> Row:
    """One load: what `vllm bench serve` measured.

    Raises:
        ValueError: it failed, or a request did.
    """
    with tempfile.TemporaryDirectory() as folder:
        data, result = Path(folder, "prompts.jsonl"), Path(folder, "result.json")
        data.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in prompts), encoding="utf-8")
        command = [
            sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", "openai-chat",
            "--base-url", url, "--endpoint", "/v1/chat/completions", "--model", "model", "--tokenizer", tokenizer,
            "--dataset-name", "custom", "--dataset-path", str(data), "--custom-output-len", str(max_tokens),
            "--skip-chat-template", "--disable-shuffle", "--num-prompts", str(len(prompts)),
            "--request-rate", str(rate), "--seed", str(seed), "--percentile-metrics", "ttft,tpot,itl,e2el",
            "--metric-percentiles", "50,99",
            "--extra-body", '{"temperature": 0}', "--disable-tqdm", "--save-result", "--result-dir", folder,
            "--result-filename", result.name,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not result.exists():
            raise ValueError(f"vllm bench serve failed:\n{(done.stderr or done.stdout)[-2000:]}")
        found: Row = json.loads(result.read_text())
    if found["failed"]:
        raise ValueError(f"{found['failed']} of {len(prompts)} requests failed at {rate:g} requests/s")
    return {key: round(found[key], 4) for key in ("duration", "completed", "total_output_tokens", *FIGURES)}


def markdown(raw: RawFile) -> str:
    """A row a rate and turn; ratios over off."""
    last = raw.runs[-1]
    names = list(FIGURES.values())
    lines = [
        f"Pair {last['settings']['pair']}, temperature 0, up to {last['settings']['max_tokens']} new tokens, requests "
        f"of all sets mixed, Poisson arrivals. {last['versions'].get('hardware', '')}.",
        "Each figure: off, specdecpp, and their ratio.",
        "",
        f"| requests/s | turn | {' | '.join(names)} |",
        "|---" * (2 + len(names)) + "|",
    ]
    for (rate, turn), of in pairs(raw).items():
        figures = [
            f"{of[OFF][key]:.4g}, {of[OURS][key]:.4g}: **{of[OURS][key] / of[OFF][key]:.2f}**" for key in FIGURES
        ]
        lines.append(f"| {rate:g} | {turn} | {' | '.join(figures)} |")
    return "\n".join([*lines, *origin(raw.runs)])


def pairs(raw: RawFile) -> dict[tuple[float, str], dict[str, Row]]:
    """Finished loads: (rate, turn) -> method -> row.

    Raises:
        ValueError: there is none.
    """
    found: dict[tuple[float, str], dict[str, Row]] = {}
    for row in raw.rows:
        found.setdefault((row["rate"], row["prompt"]), {})[row["method"]] = row
    found = {key: of for key, of in sorted(found.items()) if len(of) == 2}
    if not found:
        raise ValueError(f"{raw.path}: no load was finished by both servers yet")
    return found


def plot(raw: RawFile, path: Path) -> None:
    """TTFT, TPOT and throughput over the rate, both servers; means over the turns."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {"TTFT, ms": ("p50_ttft_ms", "p99_ttft_ms"), "TPOT, ms": ("p50_tpot_ms", "p99_tpot_ms")}
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    found = pairs(raw)
    rates = sorted({rate for rate, _ in found})
    for panel, (name, keys) in zip(axes, [*panels.items(), ("tokens per second", ("output_throughput",))], strict=True):
        for method, colour in ((OFF, "0.5"), (OURS, "tab:red")):
            for key, style in zip(keys, ("-", ":"), strict=False):
                values = [mean(of[method][key] for (r, _), of in found.items() if r == rate) for rate in rates]
                label = f"{method} {key.split('_')[0]}" if len(keys) > 1 else method
                panel.plot(rates, values, style, marker="o", color=colour, label=label)
        panel.set(xlabel="requests per second", title=name, ylim=(0, None))
        panel.legend(fontsize=7)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def write_report(raw: RawFile, out: Path) -> str:
    """Write ``out`` (JSONL), the table (.md) and the plot (.png); returns the table."""
    written = markdown(raw)
    write_files(out, raw.rows, written)
    plot(raw, out.with_suffix(".png"))
    return written


def main(argv: list[str] | None = None) -> int:
    """Command line: see the module's docstring."""
    return options.command(MODULE, make_parser(), _main, argv)


def _main(args: argparse.Namespace, argv: Sequence[str], started: float) -> int:
    raw_path = options.check_paths(args)
    prompts = load_prompts(args.data, args.sets, -(-args.prompts * args.turns * len(args.rates) // len(args.sets)))
    mixed = [row for rows in zip(*prompts.values(), strict=True) for row in rows]
    random.Random(0).shuffle(mixed)
    settings = options.engine_settings(args, args.max_num_seqs)
    raw = RawFile(raw_path)
    raw.start_run(options.shared_settings(args), options.provenance(argv, MODULE, []) | {"methods": [OFF, OURS]})
    todo = [
        (str(turn), rate, method)
        for turn in range(args.turns)
        for rate in args.rates
        for method in ((OFF, OURS) if turn % 2 else (OURS, OFF))
        if (str(turn), method, rate) not in raw.done("rate")
    ]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        urls = {}
        for method, speculative in ((OFF, None), (OURS, settings.speculative_config())):
            if any(m == method for *_, m in todo):
                print(f"starting the server '{method}' ...", flush=True)
                urls[method] = stack.enter_context(server(settings, speculative, Path(folder, f"{method}.log")))
        for left, (turn, rate, method) in enumerate(todo):
            expected = args.prompts / rate + args.max_tokens
            if args.minutes is not None and time.monotonic() - started + expected > 60 * args.minutes:
                print("time is up; the same command goes on")
                return 0
            first = (int(turn) * len(args.rates) + args.rates.index(rate)) * args.prompts
            load = mixed[first : first + args.prompts]
            row = ask(urls[method], settings.target, load, rate, args.max_tokens, seed=int(turn))
            raw.add({"prompt": turn, "method": method, "rate": rate, **row, "measured_in": raw.runs[-1]["run"]})
            figures = ", ".join(f"{row[key]:.4g} {name}" for key, name in FIGURES.items())
            print(f"{rate:g}/s turn {turn} {method}: {figures}; {len(todo) - left - 1} left", flush=True)
    print(write_report(raw, args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
