# SPDX-License-Identifier: Apache-2.0
"""Simulates serving with any acceptance process and any costs: is cost_aware near the best rule that knows them?

    python -m benchmarks.simulate --costs cpu paper --streams markov shift
    python -m benchmarks.simulate --costs cpu --streams recorded --record data/train

A stream fixes, for every output position, whether the draft's token there is accepted, so all rules meet the same text.
Seconds in the table are the true costs without noise; what cost_aware observes of them is noisy (5 %, and 1 % spikes).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllm_specdecpp.decision.cost_aware.costs import CostModel, suggested_widths
from vllm_specdecpp.decision.cost_aware.rule import CostAwareRule
from vllm_specdecpp.training.shards import open_dataset

Array = NDArray[np.float64]
HEADER = "costs      stream          K=0    best fixed     best threshold  cost_aware  /best  2nd half  /K=0   us/round"
DEPTH = 16
FIXED_KS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
THRESHOLDS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
STREAMS = ("markov", "overconfident", "underconfident", "flat", "nan", "poor", "rich", "shift", "inverted")


@dataclass
class Stream:
    """Text of one or more requests, end to end."""

    scores: Array  # [num_positions, DEPTH] score of candidate j drawn in a round that starts at the position
    run: NDArray[np.int64]  # [num_positions] candidates accepted from the position on, at most limit
    limit: NDArray[np.int64]  # [num_positions] candidates that the record knows of


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


def _cpu_verify(n: int) -> float:
    return float(np.interp(n, CPU_ROWS, CPU_SECONDS)) + max(0, n - 17) * 0.006


SETTINGS = {
    "cpu": Setting(lambda b: 0.040, lambda b: 0.036, _cpu_verify, 1),
    "cpu_b4": Setting(lambda b: 0.036 + 0.006 * b, lambda b: 0.033 + 0.004 * b, _cpu_verify, 4),
    "cpu_b16": Setting(lambda b: 0.036 + 0.006 * b, lambda b: 0.033 + 0.004 * b, _cpu_verify, 16),
    "paper": Setting(lambda b: 0.023, lambda b: 0.023, lambda n: 0.109, 1),
    "cheap": Setting(lambda b: 0.0033, lambda b: 0.0033, lambda n: 0.109, 1),
    "dear": Setting(lambda b: 0.08, lambda b: 0.08, lambda n: 0.109, 1),
    "b64": Setting(lambda b: 0.005, lambda b: 0.004, lambda n: 0.02 + 0.0006 * n, 64),
    "b64_cheap": Setting(lambda b: 0.002, lambda b: 0.0015, lambda n: 0.008 + 0.0004 * n, 64),
}


def windows(accept: Array, score: Array) -> Stream:
    """From one acceptance and one score per position."""
    size = len(accept)
    run = np.zeros(size + DEPTH + 1, dtype=np.int64)
    for i in range(size - 1, -1, -1):
        run[i] = run[i + 1] + 1 if accept[i] else 0
    padded = np.concatenate([score, np.full(DEPTH, 0.5)])
    scores = np.lib.stride_tricks.sliding_window_view(padded, DEPTH)[:size]
    return Stream(scores, run[:size], np.full(size, DEPTH))


def markov(rng: np.random.Generator, n: int, good: float, bad: float, stay: float) -> Array:
    """Acceptance probability per position: two moods, and a spread within each."""
    state = np.cumsum(rng.random(n) > stay) % 2
    return sigmoid(np.where(state == 0, _logit(good), _logit(bad)) + rng.normal(0, 1.0, n))


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _logit(p: Array | float) -> Array:
    return np.log(p / (1 - np.asarray(p)))


def make(name: str, n: int, seed: int) -> Stream:
    """A stream of ``n`` positions."""
    rng = np.random.default_rng(seed)
    if name == "markov":  # informative, calibrated up to noise
        p = markov(rng, n, 0.95, 0.4, 0.85)
        score = sigmoid(_logit(p) + rng.normal(0, 0.7, n))
    elif name == "overconfident":
        p = markov(rng, n, 0.95, 0.4, 0.85)
        score = sigmoid(2.0 * _logit(p) + 1.5 + rng.normal(0, 1.0, n))
    elif name == "underconfident":  # a head trained with w_rej = 6
        p = markov(rng, n, 0.95, 0.4, 0.85)
        score = sigmoid(0.7 * _logit(p) - 1.8 + rng.normal(0, 0.7, n))
    elif name == "flat":  # scores say nothing
        p, score = np.full(n, 0.75), rng.random(n)
    elif name == "nan":  # no scores
        p, score = np.full(n, 0.75), np.full(n, np.nan)
    elif name == "poor":
        p = markov(rng, n, 0.25, 0.05, 0.8)
        score = sigmoid(_logit(p) + 3 + rng.normal(0, 1.0, n))  # and says that it is good
    elif name == "rich":
        p = markov(rng, n, 0.99, 0.9, 0.9)
        score = sigmoid(_logit(p) + rng.normal(0, 0.7, n))
    elif name == "shift":  # three workloads, calibrated differently
        third = n // 3
        parts = [markov(rng, third, 0.97, 0.7, 0.9), markov(rng, third, 0.3, 0.05, 0.8)]
        parts.append(markov(rng, n - 2 * third, 0.93, 0.4, 0.85))
        p = np.concatenate(parts)
        bias = np.repeat([0.0, 2.5, -1.0], [third, third, n - 2 * third])
        score = sigmoid(_logit(p) + bias + rng.normal(0, 0.7, n))
    elif name == "inverted":  # a broken estimator: the surer, the worse
        p = markov(rng, n, 0.95, 0.4, 0.85)
        score = sigmoid(-_logit(p))
    else:
        raise ValueError(f"specdecpp: --streams {name} is unknown; choose among {', '.join(STREAMS)}, recorded")
    return windows((rng.random(n) < p).astype(float), score)


def recorded(folder: Path, n: int, seed: int, which: str | None = None) -> Stream:
    """A dataset of ``vllm-specdecpp collect``, prompts in random order over and over, scored by the draft's confidence.

    A round may start inside an accepted run.

    Args:
        folder: of the dataset.
        n: positions, at least.
        seed: of the order.
        which: only the prompts of this set.

    Raises:
        ValueError: no dataset there, or no round of that set.
    """
    rounds: dict[tuple[int, int], list[tuple[list[float], int]]] = {}  # (shard, prompt) -> (scores, accepted)
    for number, shard in enumerate(open_dataset(folder).shards()):
        top1, starts = shard.top1_prob.tolist(), shard.round_starts.tolist()
        for at, prompt in enumerate(shard.prompt_index.tolist()):
            if which in (None, shard.prompts[prompt]["set"]):
                scores = top1[starts[at] : starts[at + 1]]
                rounds.setdefault((number, prompt), []).append((scores, int(shard.num_accepted[at])))
    if not rounds:
        raise ValueError(f"specdecpp: {folder} has no round of set {which!r}; name another set, or collect more")
    rng = np.random.default_rng(seed)
    prompts = list(rounds.values())
    table: list[list[float]] = []
    runs: list[int] = []
    limits: list[int] = []
    while len(runs) < n:
        for i in rng.permutation(len(prompts)):
            for scores, run in prompts[i]:
                for start in range(min(run + 1, len(scores))):
                    table.append((scores[start:] + [0.5] * DEPTH)[:DEPTH])
                    runs.append(run - start)
                    limits.append(len(scores) - start)
    return Stream(np.array(table), np.array(runs), np.array(limits))


class Bench:
    """Serves ``batch`` requests from one stream each, until ``tokens`` are out."""

    def __init__(self, setting: Setting, streams: list[Stream], tokens: int) -> None:
        self.setting, self.tokens = setting, tokens
        size = min(len(s.run) for s in streams)
        self.scores = np.stack([s.scores[:size] for s in streams])  # [batch, size, DEPTH]
        self.run = np.stack([s.run[:size] for s in streams])
        self.limit = np.stack([s.limit[:size] for s in streams])
        self.size, self.rows = size, np.arange(len(streams))

    def serve(
        self, draft: Callable[[Array, NDArray[np.int64]], tuple[NDArray[np.int64], list[int]]],
        after: Callable[[NDArray[np.int64], NDArray[np.int64], list[int]], None] | None = None,
    ) -> tuple[float, list[tuple[int, float]]]:  # fmt: skip
        """Tokens per second, and (tokens, seconds) after each round."""
        at = np.zeros(len(self.rows), dtype=np.int64)
        tokens, seconds, trace = 0, 0.0, []
        while tokens < self.tokens:
            limit = np.minimum(self.limit[self.rows, at], DEPTH)
            lengths, widths = draft(self.scores[self.rows, at], limit)
            wins = np.minimum(self.run[self.rows, at], lengths)
            seconds += self.setting.round(widths, len(at) + int(lengths.sum()))
            tokens += int(wins.sum()) + len(at)
            at = (at + wins + 1) % self.size
            if after:
                after(lengths, wins, widths)
            trace.append((tokens, seconds))
        return tokens / seconds, trace

    def fixed(self, length: int) -> float:
        def draft(scores: Array, limit: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[int]]:
            lengths = np.minimum(limit, length)
            return lengths, [int((lengths >= k).sum()) for k in range(1, int(lengths.max(initial=0)) + 1)]

        return self.serve(draft)[0]

    def threshold(self, h: float, cumulative: bool) -> float:
        def draft(scores: Array, limit: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[int]]:
            known = np.nan_to_num(scores)
            low = (np.cumprod(known, axis=1) if cumulative else known) < h
            stop = np.where(low.any(axis=1), low.argmax(axis=1) + 1, DEPTH)
            lengths = np.minimum(limit, stop)
            return lengths, [int((lengths >= k).sum()) for k in range(1, int(lengths.max()) + 1)]

        return self.serve(draft)[0]

    def cost_aware(self, rule: CostAwareRule, seed: int) -> tuple[float, list[tuple[int, float]], float]:
        """Also returns the seconds a round that the rule itself took."""
        rng = np.random.default_rng(seed)
        ids = [str(i) for i in self.rows]
        clock = [0.0, 0]
        round_ = rule.begin([], [])

        def draft(scores: Array, limit: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[int]]:
            nonlocal round_
            start = time.perf_counter()
            round_ = rule.begin(ids, limit.tolist())
            while round_.running.any():
                round_.step(scores[:, len(round_.widths)])
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


def cost_model(setting: Setting, seed: int, scale: float = 1.0) -> CostModel:
    """What start-up would measure: every width a bit off, all by ``scale``."""
    rng = np.random.default_rng(seed)

    def measure(f: Callable[[int], float], most: int) -> dict[int, float]:
        return {w: scale * f(w) * float(np.exp(rng.normal(0, 0.03))) for w in suggested_widths(most)}

    most = setting.batch * (DEPTH + 1)
    tables = measure(setting.first, setting.batch), measure(setting.step, setting.batch), measure(setting.verify, most)
    return CostModel(*tables, max_reqs=setting.batch, max_tokens=most)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulate", description=summary)
    parser.add_argument("--costs", nargs="+", default=["cpu"], choices=SETTINGS, help="step costs and batch size")
    parser.add_argument(
        "--streams", nargs="+", default=["markov"], help=f"{', '.join(STREAMS)}, recorded, or recorded:SET"
    )
    parser.add_argument("--record", type=Path, help="dataset folder of vllm-specdecpp collect, for recorded streams")
    parser.add_argument("--tokens", type=int, default=6000, help="tokens that each rule emits; three times for batches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="how far off the cost model starts, as a factor")
    parser.add_argument("--no-guard", action="store_true", help="leave out the watch over the adaptive rule")
    return parser


def streams_of(name: str, setting: Setting, options: argparse.Namespace) -> list[Stream]:
    """One stream a request; ValueError for a name that is unknown, or a record that is missing."""
    tokens = options.tokens * (1 if setting.batch == 1 else 3)
    size = max(int(tokens / setting.batch * (1.02 if name == "shift" else 1)), 400)
    kind, _, which = name.partition(":")
    if kind != "recorded":
        return [make(name, size, options.seed + i) for i in range(setting.batch)]
    if options.record is None:
        raise ValueError(f"specdecpp: --streams {name} needs --record DATASET")
    return [recorded(options.record, size, options.seed + i, which or None) for i in range(setting.batch)]


def row(cost_name: str, name: str, options: argparse.Namespace) -> str:
    """One line of the table."""
    setting = SETTINGS[cost_name]
    bench = Bench(setting, streams_of(name, setting, options), options.tokens * (1 if setting.batch == 1 else 3))
    fixed = [(bench.fixed(k), k) for k in FIXED_KS]
    known = [(bench.threshold(h, c), f"{'cum' if c else 'one'} {h}") for h in THRESHOLDS for c in (True, False)]
    rule = CostAwareRule(cost_model(setting, options.seed, options.scale), DEPTH, guarded=not options.no_guard)
    rate, trace, spent = bench.cost_aware(rule, options.seed)
    half = len(trace) // 2
    late = (trace[-1][0] - trace[half][0]) / (trace[-1][1] - trace[half][1])
    best_fixed, best_known = max(fixed), max(known)
    best = max(best_fixed[0], best_known[0])
    return (
        f"{cost_name:10s} {name:14s} {fixed[0][0]:6.2f}  {best_fixed[0]:7.2f} (K={best_fixed[1]:2d})"
        f" {best_known[0]:7.2f} ({best_known[1]:8s}) {rate:7.2f}  {rate / best:6.3f}  {late / best:6.3f}"
        f"  {rate / fixed[0][0]:6.3f}  {spent * 1e6:6.0f}"
    )


def main(argv: list[str] | None = None) -> int:
    """Print the table: tokens per second of each rule, and cost_aware's ratio to the best that knows the costs."""
    options = make_parser().parse_args(argv)
    print(
        "costs      stream          K=0    best fixed     best threshold  cost_aware  /best  2nd half  /K=0   us/round"
    )
    try:
        for cost_name in options.costs:
            for name in options.streams:
                print(row(cost_name, name, options), flush=True)
    except ValueError as error:
        print(f"benchmarks.simulate: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
