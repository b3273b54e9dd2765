# SPDX-License-Identifier: Apache-2.0
"""Simulates serving with any text and any costs: what does a rule lose against the best that knows the costs?

    python -m benchmarks.simulate --streams recorded recorded:gsm8k --record data/eval --train data/train
    python -m benchmarks.simulate --streams mixed --load 0.3 0.6 0.9 --costs cpu_b4

All rules meet the same requests. Each has a prompt, which the draft model must read before it drafts, and with it all
that was emitted while it was not drafted for. What a rule observes of times is noisy, and so is what it measured at
start-up (3 % a width). A rule starts cold, warm (it has served other text before), or restored (a new one takes up the
state that a warm one kept). The rules that know the costs:

* fixed candidate lengths, and thresholds on the score or on the product of scores, the best of each chosen afterwards;
* ``informed``: cost_aware's own comparison with the true costs, a calibration learnt beforehand on other text
  (``--train``), and rho from a run before: it drafts in every round, learns nothing and wastes nothing;
* ``chosen`` (batch 1): the same, but each request is drafted for or not, whichever was the faster: no rule can know.

``oracle`` drafts just what will be accepted, up to the bound that is best. No rule can, either. Regret is against the
better of no drafting and ``informed``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.provenance import command_line
from benchmarks.simulate import report as simulate_report
from benchmarks.simulate.regret import curve, regret
from benchmarks.simulate.rules import RULES, Off, calibrated, informed_run
from benchmarks.simulate.server import Run, Server
from benchmarks.simulate.settings import OFTEN_SLOW, SETTINGS, Setting, cost_model
from benchmarks.simulate.streams import STREAMS, Array, Counts, Stream, make, recorded

FIXED_KS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
THRESHOLDS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
STARTS = ("cold", "warm", "restored")
QUICK = ["cpu_int8", "cpu", "dear", "paper", "cpu_b4", "b64"]


def threshold_lengths(server: Server, h: float, cumulative: bool) -> Counts:
    """Stops after the first candidate whose score, or the product of scores up to it, is below ``h``."""
    known = np.nan_to_num(server.scores)
    low = (np.cumprod(known, axis=1) if cumulative else known) < h
    return np.where(low.any(axis=1), low.argmax(axis=1) + 1, low.shape[1])


def tokens_of(setting: Setting, tokens: int) -> int:
    """More for batches: half as many rounds at batch 4, an eighth at batch 64."""
    return int(tokens * max(1.0, setting.batch**0.5 / 2 if setting.batch < 64 else 3.0))


def streams_of(name: str, setting: Setting, options: argparse.Namespace, seed: int) -> list[Stream]:
    """One stream a request; ValueError for a name that is unknown, or a record that is missing."""
    tokens = tokens_of(setting, options.tokens)
    size = max(int(tokens / setting.batch * (1.02 if name == "shift" else 1.5)), 400)
    seeds = [1000 * seed + i for i in range(setting.batch)]
    kind, _, which = name.partition(":")
    if kind != "recorded":
        return [make(name, size, seed) for seed in seeds]
    if options.record is None:
        raise ValueError(f"specdecpp: --streams {name} needs --record DATASET")
    return [recorded(options.record, size, seed, which or None) for seed in seeds]


def training_stream(name: str, options: argparse.Namespace, size: int = 6000, seed: int = 999_999) -> Stream:
    """Other text than :func:`streams_of` gives: another seed, or the ``--train`` dataset."""
    if name.partition(":")[0] != "recorded":
        return make(name, size, seed)
    if options.train is None:
        raise ValueError(f"specdecpp: --streams {name} needs --train DATASET, for the informed rule's calibration")
    return recorded(options.train, size, seed)


def earlier(name: str, setting: Setting, options: argparse.Namespace, seed: int) -> list[Stream]:
    """What a warm rule served before: the ``--train`` dataset, or a mixture of all sorts."""
    kind = name if name.partition(":")[0] == "recorded" else "mixed"
    tokens = tokens_of(setting, options.warm_tokens)
    size = max(tokens // setting.batch, 400)
    return [training_stream(kind, options, size, 500_000 + 1000 * seed + i) for i in range(setting.batch)]


def started(start: str, name: str, setting: Setting, options: argparse.Namespace, seed: int) -> Any:
    """A rule that is cold, warm or restored."""
    rule = RULES[options.rule](cost_model(setting, seed, options.scale, options.slow))
    if start != "cold":
        server = Server(setting, earlier(name, setting, options, seed), tokens_of(setting, options.warm_tokens))
        server.play(rule, seed, name="earlier-")
    if start == "restored":
        state, rule = rule.state(), RULES[options.rule](cost_model(setting, seed, options.scale, options.slow))
        rule.restore(state)
    return rule


def off_run(server: Server) -> Run:
    """Without drafting every round is alike."""
    size = len(server.streams)
    rounds = server.tokens // size + 1
    return Run([0, size * rounds], [0.0, rounds * server.setting.verify(size)])


def measure(cost_name: str, name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one cell, one for each start: means over the seeds."""
    setting = SETTINGS[cost_name]
    acceptance = calibrated([training_stream(name, options)])
    rows: dict[str, list[dict[str, Any]]] = {start: [] for start in options.starts}
    rivals = []
    for seed in range(options.seed, options.seed + options.seeds):
        server = Server(setting, streams_of(name, setting, options, seed), tokens_of(setting, options.tokens))
        everywhere = np.full(len(server.run), 1)
        fixed = [server.planned(k * everywhere) for k in FIXED_KS]
        known = [[server.planned(threshold_lengths(server, h, c)) for c in (True, False)] for h in THRESHOLDS]
        informed = informed_run(server, acceptance, max(fixed), float(np.max(known)))
        off = off_run(server)
        oracle = max(server.planned(np.minimum(server.run, most)) for most in FIXED_KS)
        rivals.append((np.array(fixed), np.array(known), informed.rate, chosen(server, informed), oracle))
        best = max(off, informed, key=lambda run: run.rate)
        for start in options.starts:
            rule = started(start, name, setting, options, seed)
            run = server.play(rule, seed)
            lost = regret(run, best, setting.batch)
            tokens, losses = curve(run, best)
            rows[start].append({
                "cost_aware": run.rate, "loss_first": lost.first, "loss_worst": lost.worst, "loss_after": lost.after,
                "tried": lost.tried, "rule_us_per_round": 1e6 * run.rule_seconds / len(run.tokens),
                "first_draft": run.first_draft, "candidates_per_token": run.drafted / run.tokens[-1],
                "curve": [tokens.round(1).tolist(), losses.round(5).tolist()],
            })  # fmt: skip
    fixed, known, informed, best_choice, oracle = (
        sum(column) / options.seeds for column in zip(*rivals, strict=True)
    )  # fmt: skip
    at = np.unravel_index(int(np.argmax(known)), np.shape(known))
    common = {
        "costs": cost_name,
        "batch": setting.batch,
        "stream": name,
        "off": float(fixed[0]),
        "fixed": float(np.max(fixed)),
        "fixed_k": FIXED_KS[int(np.argmax(fixed))],
        "threshold": float(np.max(known)),
        "threshold_h": f"{'product' if at[1] == 0 else 'score'} < {THRESHOLDS[at[0]]}",
        "informed": float(informed),
        "chosen": float(best_choice),
        "oracle": float(oracle),
        "tokens": tokens_of(setting, options.tokens),
        "seeds": options.seeds,
        "slow": options.slow,
    }
    return [_rounded({**common, "start": start, **_means(rows[start])}) for start in options.starts]


def chosen(server: Server, informed: Run) -> float:
    """Tokens per second if each request were drafted for only where that was the faster; at batch 1."""
    if server.setting.batch > 1 or not informed.requests:
        return max(informed.rate, server.setting.batch / server.setting.verify(server.setting.batch))
    lengths = np.resize(np.diff(server.streams[0].starts), len(informed.requests))
    off = lengths * server.setting.verify(1)
    return float(lengths.sum() / np.minimum(off, informed.requests).sum())


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {key: float(np.mean([row[key] for row in rows])) for key in rows[0] if key not in _OWN}
    firsts = [row["first_draft"] for row in rows]
    out["first_draft"] = None if None in firsts else float(np.mean([f for f in firsts if f is not None]))
    out["loss_worst"] = max(row["loss_worst"] for row in rows)
    shortest = min((row["curve"] for row in rows), key=lambda c: c[0][-1])[0]
    out["curve"] = [shortest, np.mean([np.interp(shortest, *row["curve"]) for row in rows], axis=0).round(5).tolist()]
    return out


_OWN = ("first_draft", "curve")


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}


def serve_mix(cost_name: str, name: str, load: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Poisson arrivals at ``load`` times what the engine could serve without drafting: one row for each start."""
    setting = SETTINGS[cost_name]
    total = tokens_of(setting, options.tokens)
    rows: dict[str, list[dict[str, Any]]] = {start: [] for start in options.starts}
    for seed in range(options.seed, options.seed + options.seeds):
        stream = _one(name, total * 2, options, seed)
        server = Server(setting, [stream], total)
        sizes = np.diff(stream.starts)
        each = float(sizes.mean()) * setting.verify(setting.batch) / setting.batch
        each += setting.prefill(int(stream.prompt_tokens.mean()))
        gaps = np.random.default_rng(seed).exponential(each / load, len(sizes))
        arrivals: list[float] = gaps.cumsum().tolist()
        off = waits(server.play(Off(), seed, arrivals))
        for start in options.starts:
            run = server.play(started(start, name, setting, options, seed), seed, arrivals)
            mine = waits(run)
            rows[start].append({
                "ttft": mine[0], "tpot": mine[1], "off_ttft": off[0], "off_tpot": off[1],
                "candidates_per_token": run.drafted / run.tokens[-1],
            })  # fmt: skip
    return [
        _rounded({
            "costs": cost_name, "batch": setting.batch, "stream": name, "load": load, "start": start, "tokens": total,
            "seeds": options.seeds, **{key: float(np.mean([row[key] for row in mine])) for key in mine[0]},
        })
        for start, mine in rows.items()
    ]  # fmt: skip


def _one(name: str, size: int, options: argparse.Namespace, seed: int) -> Stream:
    kind, _, which = name.partition(":")
    if kind != "recorded":
        return make(name, size, 1000 * seed)
    if options.record is None:
        raise ValueError(f"specdecpp: --streams {name} needs --record DATASET")
    return recorded(options.record, size, 1000 * seed, which or None)


def waits(run: Run, after: int = 200) -> tuple[float, float]:
    """Median time to first token, and time per token after the first ``after`` tokens: seconds."""
    late = [(seconds, tokens) for before, seconds, tokens in run.per_token if before >= after]
    times: Array = np.array(late, dtype=np.float64).sum(axis=0) if late else np.array([np.nan, 1.0])
    return float(np.median(run.to_first)), float(times[0] / times[1])


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulate", description=summary)
    parser.add_argument("--costs", nargs="+", default=list(SETTINGS), choices=SETTINGS, help="costs and batch size")
    parser.add_argument(
        "--streams", nargs="+", default=["mixed"], help=f"{', '.join(STREAMS)}, recorded, or recorded:SET"
    )
    parser.add_argument("--record", type=Path, help="dataset folder of vllm-specdecpp collect, for recorded streams")
    parser.add_argument("--train", type=Path, help="another dataset: the informed rule's calibration, and warm starts")
    parser.add_argument("--rule", default="cost_aware", choices=RULES)
    parser.add_argument("--starts", nargs="+", default=["cold"], choices=STARTS)
    parser.add_argument("--load", nargs="+", type=float, help="a served mix: arrivals over what off can serve")
    parser.add_argument("--tokens", type=int, default=6000, help="tokens that each rule emits; more for batches")
    parser.add_argument("--warm-tokens", type=int, default=3000, help="tokens that a warm rule served before")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1, help="so many runs, with seed, seed + 1, ...; rates are means")
    parser.add_argument("--scale", type=float, default=1.0, help="how far off the cost model starts, as a factor")
    parser.add_argument(
        "--slow", type=float, default=OFTEN_SLOW, help="share of the widths that start-up timed in a slow moment"
    )
    parser.add_argument("--quick", action="store_true", help=f"fewer tokens, and of all costs {', '.join(QUICK)}")
    parser.add_argument("--out", type=Path, help="result rows (JSONL), with a page (.md) and plots (.png) beside them")
    parser.add_argument("--force", action="store_true", help="replace files that are there")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print the table: tokens per second of each rule, and what cost_aware loses against the best that knows."""
    options = make_parser().parse_args(argv)
    if options.quick:
        options.tokens, options.warm_tokens = min(options.tokens, 3000), min(options.warm_tokens, 2000)
        options.costs = [name for name in options.costs if name in QUICK] or options.costs
    if not 0 <= options.slow <= 1:
        print(f"benchmarks.simulate: --slow {options.slow} must be between 0 and 1", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    command = command_line(sys.argv[1:] if argv is None else argv, "benchmarks.simulate")
    try:
        if options.out is not None:
            simulate_report.check_free(options.out, options.force)
        print(simulate_report.MIX_HEADER if options.load else simulate_report.HEADER)
        for cost_name in options.costs:
            for name in options.streams:
                if options.load:
                    cells = [row for load in options.load for row in serve_mix(cost_name, name, load, options)]
                else:
                    cells = measure(cost_name, name, options)
                rows += cells
                for row in cells:
                    print(simulate_report.line(row), flush=True)
                if options.out is not None:  # after each: a long run that is ended leaves what it has
                    simulate_report.write(rows, options.out, command, plots=False)
    except ValueError as error:
        print(f"benchmarks.simulate: {error}", file=sys.stderr)
        return 2
    print("\n".join(simulate_report.summary(rows)))
    if options.out is not None:
        simulate_report.write(rows, options.out, command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
