# SPDX-License-Identifier: Apache-2.0
"""Simulates serving with any acceptance process and any costs: is cost_aware near the best rule that knows them?

    python -m benchmarks.simulate --costs cpu paper --streams markov shift
    python -m benchmarks.simulate --costs cpu --streams recorded --record data/eval --train data/train

All rules meet the same text. Each prompt in it is a new request, with an id of its own, as in serving; made-up text has
prompts of 128 tokens. Seconds are the true costs without noise; what cost_aware observes of them is noisy (5 %, and 1 %
spikes), and so is what it measured at start-up (3 % a width). The rules that know the costs:

* fixed candidate lengths, and thresholds on the score or on the product of scores, the best of each chosen afterwards;
* ``informed``: cost_aware's own comparison with the true costs, a calibration learnt beforehand on other text
  (``--train``), and rho found by trying: it learns nothing and wastes nothing on learning.

``oracle`` knows the outcomes as well: it drafts just what will be accepted, up to the bound that is best. No rule can.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import simulate_report
from benchmarks.provenance import command_line
from benchmarks.simulated_streams import DEPTH, STREAMS, Array, Stream, make, recorded
from vllm_specdecpp.costs.model import CostModel, suggested_widths
from vllm_specdecpp.decision.cost_aware.online import AcceptanceModel, logit
from vllm_specdecpp.decision.cost_aware.rule import CostAwareRound, CostAwareRule

FIXED_KS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
THRESHOLDS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
INFORMED_TRIES = 3
"""Runs of the informed rule, each with the rate of the one before as its rho; they hardly move after the second."""


@dataclass
class Setting:
    """True costs."""

    first: Callable[[int], float]
    step: Callable[[int], float]
    verify: Callable[[int], float]
    batch: int

    def round(self, widths: list[int], tokens: int) -> float:
        if not widths:
            return self.verify(tokens)
        return self.first(widths[0]) + sum(self.step(w) for w in widths[1:]) + self.verify(tokens)


CPU_ROWS = [1, 2, 3, 4, 5, 6, 9, 17]
CPU_SECONDS = [0.156, 0.165, 0.132, 0.130, 0.127, 0.129, 0.170, 0.219]


ONE_CORE_ROWS = [1, 6, 7, 16, 21]
ONE_CORE_SECONDS = [0.185, 0.188, 0.225, 0.337, 0.399]


def _one_core_verify(n: int) -> float:
    return float(np.interp(n, ONE_CORE_ROWS, ONE_CORE_SECONDS)) + max(0, n - 21) * 0.0125


def _cpu_verify(n: int) -> float:
    return float(np.interp(n, CPU_ROWS, CPU_SECONDS)) + max(0, n - 17) * 0.006


SETTINGS = {
    "cpu": Setting(lambda b: 0.040, lambda b: 0.036, _cpu_verify, 1),
    "one_core": Setting(lambda b: 0.055, lambda b: 0.055, _one_core_verify, 1),
    "one_core_b4": Setting(lambda b: 0.051 + 0.004 * b, lambda b: 0.051 + 0.004 * b, _one_core_verify, 4),
    "cpu_b4": Setting(lambda b: 0.036 + 0.006 * b, lambda b: 0.033 + 0.004 * b, _cpu_verify, 4),
    "cpu_b16": Setting(lambda b: 0.036 + 0.006 * b, lambda b: 0.033 + 0.004 * b, _cpu_verify, 16),
    "paper": Setting(lambda b: 0.023, lambda b: 0.023, lambda n: 0.109, 1),
    "cheap": Setting(lambda b: 0.0033, lambda b: 0.0033, lambda n: 0.109, 1),
    "dear": Setting(lambda b: 0.08, lambda b: 0.08, lambda n: 0.109, 1),
    "b64": Setting(lambda b: 0.005, lambda b: 0.004, lambda n: 0.02 + 0.0006 * n, 64),
    "b64_cheap": Setting(lambda b: 0.002, lambda b: 0.0015, lambda n: 0.008 + 0.0004 * n, 64),
}


class Bench:
    """Serves one stream of prompts for each place in the batch, until ``tokens`` are out."""

    def __init__(self, setting: Setting, streams: list[Stream], tokens: int) -> None:
        self.setting, self.tokens = setting, tokens
        size = min(len(s.run) for s in streams)
        self.scores = np.stack([s.scores[:size] for s in streams])  # [batch, size, DEPTH]
        self.run = np.stack([s.run[:size] for s in streams])
        self.limit = np.minimum(np.stack([s.limit[:size] for s in streams]), DEPTH)
        self.prompt = np.stack([s.prompt[:size] for s in streams])
        self.size, self.rows = size, np.arange(len(streams))

    def serve(
        self, draft: Callable[[list[str], Array, NDArray[np.int64]], tuple[NDArray[np.int64], list[int]]],
        after: Callable[[NDArray[np.int64], NDArray[np.int64], list[int]], None] | None = None,
    ) -> tuple[float, list[tuple[int, float]]]:  # fmt: skip
        """Tokens per second, and (tokens, seconds) after each round.

        ``draft`` gets the request ids of the batch, a new one for each prompt, and its scores and limits.
        """
        at, lap = np.zeros((2, len(self.rows)), dtype=np.int64)  # lap: times that the stream began again
        tokens, seconds, trace = 0, 0.0, []
        while tokens < self.tokens:
            prompts = zip(self.rows, lap, self.prompt[self.rows, at], strict=True)
            ids = ["{}-{}-{}".format(*prompt) for prompt in prompts]
            lengths, widths = draft(ids, self.scores[self.rows, at], self.limit[self.rows, at])
            wins = np.minimum(self.run[self.rows, at], lengths)
            seconds += self.setting.round(widths, len(at) + int(lengths.sum()))
            tokens += int(wins.sum()) + len(at)
            passed, at = np.divmod(at + wins + 1, self.size)
            lap += passed
            if after:
                after(lengths, wins, widths)
            trace.append((tokens, seconds))
        return tokens / seconds, trace

    def planned(self, lengths: NDArray[np.int64]) -> float:
        """Tokens per second where a round from each position of each stream has this length: [batch, size]."""
        step = np.minimum(self.run, lengths) + 1  # [batch, size]
        at = np.zeros(len(self.rows), dtype=np.int64)
        known: dict[tuple[int, ...], float] = {}  # widths -> seconds: few differ
        tokens, seconds = 0, 0.0
        while tokens < self.tokens:
            here = lengths[self.rows, at]
            counts = np.bincount(here)
            widths = tuple((len(at) - np.cumsum(counts)[:-1]).tolist())  # of pass k: requests longer than k - 1
            if widths not in known:
                known[widths] = self.setting.round(list(widths), len(at) + int(here.sum()))
            emitted = step[self.rows, at]
            seconds += known[widths]
            tokens += int(emitted.sum())
            at = (at + emitted) % self.size
        return tokens / seconds

    def fixed(self, length: int) -> float:
        return self.planned(np.minimum(self.limit, length))

    def oracle(self) -> float:
        """Tokens per second of drafting just what will be accepted, up to the best bound."""
        return max(self.planned(np.minimum(np.minimum(self.run, self.limit), most)) for most in FIXED_KS)

    def threshold(self, h: float, cumulative: bool, lag: int = 0) -> float:
        """Stops after the first candidate whose score, or the product of scores up to it, is below ``h``; with lag 1
        one candidate later, as the paper does."""
        known = np.nan_to_num(self.scores)
        low = (np.cumprod(known, axis=2) if cumulative else known) < h
        return self.planned(np.minimum(self.limit, np.where(low.any(axis=2), low.argmax(axis=2) + 1 + lag, DEPTH)))

    def cost_aware(self, rule: CostAwareRule, seed: int) -> tuple[float, list[tuple[int, float]], float]:
        """Also returns the seconds a round that the rule itself took."""
        rng = np.random.default_rng(seed)
        clock = [0.0, 0]
        round_ = rule.begin([], [])

        def draft(ids: list[str], scores: Array, limit: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[int]]:
            nonlocal round_
            start = time.perf_counter()
            round_ = rule.begin(ids, limit.tolist())
            while round_.running.any():
                round_.step(self.seen(scores, len(round_.widths), rule.lag))
            clock[0] += time.perf_counter() - start
            return round_.lengths, list(round_.widths)

        def after(lengths: NDArray[np.int64], wins: NDArray[np.int64], widths: list[int]) -> None:
            noise = np.exp(rng.normal(0, 0.05, 2)) * np.where(rng.random(2) < 0.01, 8, 1)
            verify = self.setting.verify(len(self.rows) + int(lengths.sum()))
            spent = self.setting.round(widths, 1) - self.setting.verify(1)
            start = time.perf_counter()
            rule.finish(round_, lengths.tolist(), wins.tolist(), spent * noise[0], verify * noise[1])
            clock[0] += time.perf_counter() - start
            clock[1] += 1

        rate, trace = self.serve(draft, after)
        return rate, trace, clock[0] / clock[1]

    def seen(self, scores: Array, num_drawn: int, lag: int) -> Array | None:
        """What an estimator of this lag gives at the step after ``num_drawn`` candidates: [batch]."""
        if num_drawn < lag:
            return None
        return scores[:, num_drawn - lag]


class Informed(CostAwareRule):
    """Knows costs, calibration and rho, and learns nothing."""

    rho = 0.0

    def begin(self, request_ids: Sequence[str], max_lengths: Sequence[int]) -> CostAwareRound:
        limits = np.minimum(np.asarray(max_lengths, dtype=np.int64), self.max_length)
        return CostAwareRound(self, list(request_ids), limits, limits > 0, self.rho)

    def finish(self, *args: object) -> None:
        """Learns nothing."""


def informed_rate(bench: Bench, costs: CostModel, acceptance: AcceptanceModel, start: float, lag: int = 0) -> float:
    """Tokens per second of the informed rule on a bench, the best of a few rho."""
    rule = Informed(costs, DEPTH, lag=lag, acceptance=acceptance)
    rates = [start]
    for _ in range(INFORMED_TRIES):
        rule.rho = rates[-1]
        rates.append(bench.cost_aware(rule, 0)[0])
    return max(rates[1:])


def calibrated(streams: list[Stream]) -> AcceptanceModel:
    """A calibration from streams served with the longest candidate lengths; nothing is forgotten."""
    model = AcceptanceModel(memory=1e9)
    for stream in streams:
        at = 0
        while at < len(stream.run):
            verified, accepted = int(min(stream.limit[at], DEPTH)), int(stream.run[at])
            model.update_run(logit(stream.scores[at]).tolist(), min(accepted, verified), verified)
            at += accepted + 1
    return model


def cost_model(setting: Setting, seed: int, scale: float = 1.0) -> CostModel:
    """What start-up would measure: every width a bit off, all by ``scale``."""
    rng = np.random.default_rng(seed)

    def measure(f: Callable[[int], float], most: int) -> dict[int, float]:
        return {w: scale * f(w) * float(np.exp(rng.normal(0, 0.03))) for w in suggested_widths(most)}

    most = setting.batch * (DEPTH + 1)
    tables = measure(setting.first, setting.batch), measure(setting.step, setting.batch), measure(setting.verify, most)
    return CostModel(*tables, max_reqs=setting.batch, max_tokens=most)


def true_costs(setting: Setting) -> CostModel:
    """Every width as it is."""
    most = setting.batch * (DEPTH + 1)
    first, step = ({w: f(w) for w in range(1, setting.batch + 1)} for f in (setting.first, setting.step))
    verify = {w: setting.verify(w) for w in range(1, most + 1)}
    return CostModel(first, step, verify, max_reqs=setting.batch, max_tokens=most)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulate", description=summary)
    parser.add_argument("--costs", nargs="+", default=["cpu"], choices=SETTINGS, help="step costs and batch size")
    parser.add_argument(
        "--streams", nargs="+", default=["markov"], help=f"{', '.join(STREAMS)}, recorded, or recorded:SET"
    )
    parser.add_argument("--record", type=Path, help="dataset folder of vllm-specdecpp collect, for recorded streams")
    parser.add_argument("--train", type=Path, help="another dataset, for the informed rule's calibration")
    parser.add_argument("--tokens", type=int, default=6000, help="tokens that each rule emits; three times for batches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1, help="so many runs, with seed, seed + 1, ...; rates are means")
    parser.add_argument("--scale", type=float, default=1.0, help="how far off the cost model starts, as a factor")
    parser.add_argument("--no-guard", action="store_true", help="leave out the watch over the adaptive rule")
    parser.add_argument("--out", type=Path, help="result rows (JSONL), with a page (.md) and a plot (.png) beside them")
    parser.add_argument("--force", action="store_true", help="replace files that are there")
    return parser


def streams_of(name: str, setting: Setting, options: argparse.Namespace, seed: int) -> list[Stream]:
    """One stream a request; ValueError for a name that is unknown, or a record that is missing."""
    tokens = options.tokens * (1 if setting.batch == 1 else 3)
    size = max(int(tokens / setting.batch * (1.02 if name == "shift" else 1)), 400)
    seeds = [1000 * seed + i for i in range(setting.batch)]
    kind, _, which = name.partition(":")
    if kind != "recorded":
        return [make(name, size, seed) for seed in seeds]
    if options.record is None:
        raise ValueError(f"specdecpp: --streams {name} needs --record DATASET")
    return [recorded(options.record, size, seed, which or None) for seed in seeds]


def training_streams(name: str, options: argparse.Namespace) -> list[Stream]:
    """Other text than :func:`streams_of` gives: another seed, or the ``--train`` dataset."""
    if name.partition(":")[0] != "recorded":
        return [make(name, 6000, 999_999)]
    if options.train is None:
        raise ValueError(f"specdecpp: --streams {name} needs --train DATASET, for the informed rule's calibration")
    return [recorded(options.train, 6000, 999_999)]


def measure(cost_name: str, name: str, options: argparse.Namespace) -> dict[str, object]:
    """One cell: tokens per second of each rule, means over the seeds."""
    setting = SETTINGS[cost_name]
    tokens = options.tokens * (1 if setting.batch == 1 else 3)
    acceptance = calibrated(training_streams(name, options))
    fixed, known = np.zeros(len(FIXED_KS)), np.zeros((len(THRESHOLDS), 2))
    informed, oracle, rates, late, spent = [], [], [], [], []
    for seed in range(options.seed, options.seed + options.seeds):
        bench = Bench(setting, streams_of(name, setting, options, seed), tokens)
        here = np.array([bench.fixed(k) for k in FIXED_KS])
        fixed += here / options.seeds
        known += [[bench.threshold(h, c) / options.seeds for c in (True, False)] for h in THRESHOLDS]
        informed.append(informed_rate(bench, true_costs(setting), acceptance, float(here.max())))
        oracle.append(bench.oracle())
        rule = CostAwareRule(cost_model(setting, seed, options.scale), DEPTH, guarded=not options.no_guard)
        rate, trace, seconds = bench.cost_aware(rule, seed)
        half = trace[len(trace) // 2]
        rates.append(rate)
        late.append((trace[-1][0] - half[0]) / (trace[-1][1] - half[1]))
        spent.append(seconds)
    at = np.unravel_index(int(known.argmax()), known.shape)
    return {
        "costs": cost_name,
        "batch": setting.batch,
        "stream": name,
        "off": round(float(fixed[0]), 3),
        "fixed": round(float(fixed.max()), 3),
        "fixed_k": FIXED_KS[int(fixed.argmax())],
        "threshold": round(float(known.max()), 3),
        "threshold_h": f"{'product' if at[1] == 0 else 'score'} < {THRESHOLDS[at[0]]}",
        "informed": round(float(np.mean(informed)), 3),
        "oracle": round(float(np.mean(oracle)), 3),
        "cost_aware": round(float(np.mean(rates)), 3),
        "cost_aware_second_half": round(float(np.mean(late)), 3),
        "rule_us_per_round": round(float(np.mean(spent)) * 1e6, 1),
        "tokens": tokens,
        "seeds": options.seeds,
    }


def main(argv: list[str] | None = None) -> int:
    """Print the table: tokens per second of each rule, and cost_aware's ratio to the best that knows the costs."""
    options = make_parser().parse_args(argv)
    rows = []
    try:
        if options.out is not None:
            simulate_report.check_free(options.out, options.force)
        print(simulate_report.HEADER)
        for cost_name in options.costs:
            for name in options.streams:
                rows.append(measure(cost_name, name, options))
                print(simulate_report.line(rows[-1]), flush=True)
    except ValueError as error:
        print(f"benchmarks.simulate: {error}", file=sys.stderr)
        return 2
    if options.out is not None:
        command = command_line(sys.argv[1:] if argv is None else argv, "benchmarks.simulate")
        simulate_report.write(rows, options.out, command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
