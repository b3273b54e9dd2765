# SPDX-License-Identifier: Apache-2.0
"""What deciding costs: processor seconds that the cost-aware rule itself takes of a round, by part.

    python -m benchmarks.simulate.overhead --batches 1 16 --passes 5
    python -m benchmarks.simulate.overhead --runs --batches 64    # the search for free runs in 32,768 tokens a request

A round is `begin`, a `step` for each draft pass and `finish`. Between two calls a few MiB are read, since a model's
pass leaves none of the rule in the processor's caches; ``--warm`` leaves that out. With ``--v2`` it is the host's part
on Model Runner V2, with all that brings a round to the device and back: `begin` plans and loads, `report` is queued
behind the drafting, `finish` takes in what came back; the steps are the device's.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.common import provenance
from vllm_specdecpp.costs.model import CostModel
from vllm_specdecpp.decision.cost_aware.rule import CostAwareRule, Standing
from vllm_specdecpp.decision.cost_aware.tail import CostAwareTail
from vllm_specdecpp.decision.rules import make_estimator
from vllm_specdecpp.decision.sources import propose
from vllm_specdecpp.decision.sources.suffix import SuffixSource
from vllm_specdecpp.source_registry import RUN_SOURCES, make_sources

PARTS = ("begin", "step", "finish")
PARTS_V2 = ("begin", "report", "finish")
V2_REQS, V2_TOKENS = 256, 4096
"""Sizes of the tables that a round loads, as on a GPU."""
MAX_LENGTH = 16
FIRST, STEP, VERIFY = 0.040, 0.036, {1: 0.156, 4: 0.130, 9: 0.170, 17: 0.219, 1024: 4.0}
"""Seconds, measured with the Qwen pair on two cores."""


def measure(
    batch: int, passes: int, rounds: int, cold: bool = True, seed: int = 0
) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.int64]]:
    """Time rounds that take about ``passes`` draft passes.

    Args:
        batch: requests.
        passes: the most passes; some rounds end sooner, as the rule decides.
        rounds: timed ones, after as many as 50 that are not.
        cold: read a few MiB before each call.
        seed: of scores and outcomes.

    Returns:
        Part -> [rounds] seconds (of `step`: the sum of a round), and [rounds] passes.
    """
    rng = np.random.default_rng(seed)
    costs = CostModel({1: FIRST}, {1: STEP}, VERIFY, max_reqs=max(batch, 1), max_tokens=batch * (MAX_LENGTH + 1))
    rule = CostAwareRule(costs, MAX_LENGTH)
    requests = [Standing(f"request-{i}", passes, room=10_000, behind=0, emitted=1) for i in range(batch)]
    ballast = np.ones(1 << 20 if cold else 1)  # 8 MiB
    spent = {part: np.zeros(rounds) for part in PARTS}
    num_passes = np.zeros(rounds, dtype=np.int64)
    for turn in range(-min(50, rounds), rounds):
        accept = rng.beta(12, 0.6, (passes, batch))  # [passes, batch], mostly high, so that rounds are long
        clock = dict.fromkeys(PARTS, 0.0)
        ballast.sum()
        start = time.thread_time()
        round_ = rule.begin(requests)
        clock["begin"] = time.thread_time() - start
        while round_.running.any():
            ballast.sum()
            start = time.thread_time()
            round_.step(accept[len(round_.widths)])
            clock["step"] += time.thread_time() - start
        lengths = round_.lengths.tolist()
        drawn = rng.random((passes, batch)) < accept
        wins = [int(np.argmin(np.append(drawn[:length, i], False))) for i, length in enumerate(lengths)]
        noise = np.exp(rng.normal(0, 0.05, 2))
        draft_seconds = costs.draft_seconds(round_.widths) * noise[0]
        verify_seconds = costs.verify.at(batch + sum(lengths)) * noise[1]
        ballast.sum()
        start = time.thread_time()
        rule.finish(round_, lengths, wins, draft_seconds, verify_seconds)
        clock["finish"] = time.thread_time() - start
        if turn >= 0:
            num_passes[turn] = len(round_.widths)
            for part in PARTS:
                spent[part][turn] = clock[part]
    return spent, num_passes


@torch.inference_mode()
def measure_v2(
    batch: int, passes: int, rounds: int, cold: bool = True, seed: int = 0
) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.int64]]:
    """As :func:`measure`, of the host's part on Model Runner V2."""
    from vllm_specdecpp.engine.v2.cost_aware import DeviceCostAware

    rng = np.random.default_rng(seed)
    rule = CostAwareRule(CostModel({1: FIRST}, {1: STEP}, VERIFY, max_reqs=V2_REQS, max_tokens=V2_TOKENS), MAX_LENGTH)
    tail = CostAwareTail(make_estimator(None), V2_REQS, MAX_LENGTH, V2_TOKENS, "cpu")
    host = DeviceCostAware(rule, tail, None, lambda tensor: tensor, torch.device("cpu"))
    clock: Iterator[float] = iter(())
    host._clock.mark = lambda: next(clock)  # type: ignore[method-assign]
    names, nothing = [f"request-{i}" for i in range(batch)], [0] * batch
    ballast = np.ones(1 << 20 if cold else 1)  # 8 MiB
    spent = {part: np.zeros(rounds) for part in PARTS_V2}
    num_passes = np.zeros(rounds, dtype=np.int64)
    lengths = sampled = rejected = torch.zeros(batch, dtype=torch.int32)
    now = 0.0
    for turn in range(-min(50, rounds), rounds):  # what is not timed is written over
        calls = {
            "finish": lambda: host.verified(names, [False] * batch, sampled, rejected),  # noqa: B023
            "begin": lambda: host.begin_round(
                names, [passes] * batch, nothing, nothing, [10_000] * batch, [1] * batch, [False] * batch
            ),
            "report": lambda: host.drafted((), batch, lengths),  # noqa: B023
        }
        for part, call in calls.items():
            if part == "report":
                lengths, num_passes[turn] = _draft(tail, rng.beta(12, 0.6, (passes, batch)).astype(np.float32))
                widths = [width for width in tail.widths.tolist() if width]
                now += rule.costs.draft_seconds(widths) * math.exp(rng.normal(0, 0.05))
            clock = iter((now,))
            ballast.sum()
            start = time.thread_time()
            call()
            spent[part][turn] = time.thread_time() - start
        drawn = rng.random((passes, batch)) < 0.95
        wins = torch.from_numpy(np.cumprod(drawn, axis=0).sum(axis=0)).int().minimum(lengths)
        sampled, rejected = wins + 1, lengths - wins
        now += rule.costs.verify.at(batch + int(lengths.sum())) * math.exp(rng.normal(0, 0.05))
    return spent, num_passes


def _draft(tail: CostAwareTail, scores: NDArray[np.float32]) -> tuple[torch.Tensor, int]:
    """A round of the device: [num_reqs] int32 candidates submitted, and its passes."""
    passes, num_reqs = scores.shape
    state = {
        "survival": torch.ones(num_reqs), "lengths": torch.zeros(num_reqs, dtype=torch.int32),
        "running": torch.zeros(num_reqs, dtype=torch.int32), "any_running": torch.zeros(1),
        "stop_token_ids": torch.zeros(num_reqs, 0, dtype=torch.int64),
        "draft_tokens": torch.zeros(num_reqs, passes, dtype=torch.int64),
    }  # fmt: skip
    tail.start(torch.full((num_reqs,), passes, dtype=torch.int32), state["running"])
    step = 0
    while step < passes and state["running"].any():
        step += 1
        tail.append(torch.from_numpy(scores[step - 1]), torch.zeros(num_reqs, dtype=torch.int64), step, **state)
    return state["lengths"], step


def _words(rng: np.random.Generator, num: int) -> NDArray[np.int32]:
    """[num] tokens as frequent as words are: Zipf's law over 50,000."""
    return np.minimum(rng.zipf(1.2, num), 50_000).astype(np.int32)


def _edits(rng: np.random.Generator, num: int) -> NDArray[np.int32]:
    """[num] tokens: pieces of an eighth of them, again and again."""
    once = _words(rng, num // 8)
    pieces = [once[i : i + 200] for i in rng.integers(0, len(once), num // 50)]
    return np.resize(np.concatenate([once, *pieces]), num)


TEXTS: dict[str, Callable[[np.random.Generator, int], NDArray[np.int32]]] = {
    "words": _words,
    "edits": _edits,
    "a loop of 100": lambda rng, num: np.resize(_words(rng, 100), num),
    "one token": lambda rng, num: np.zeros(num, np.int32),
    "two tokens": lambda rng, num: rng.integers(0, 2, num, dtype=np.int32),
}


def search(
    batch: int, length: int, rounds: int, seed: int = 0, others: bool = False
) -> dict[str, NDArray[np.float64]]:  # fmt: skip
    """Time the search for free runs on Model Runner V1, its reading of a request's tokens with it.

    Args:
        batch: requests, with a text of their own each.
        length: tokens of each.
        rounds: in which each emits three tokens.
        seed: of the texts.
        others: search in other requests' outputs, too: the second half of each text is output.

    Returns:
        Kind of text -> [rounds] seconds a request.
    """
    spent = {}
    for name, make in TEXTS.items():
        sources = make_sources(list(RUN_SOURCES), "engine" if others else "request")
        texts = [make(np.random.default_rng([seed, i]), length + 3 * rounds) for i in range(batch)]
        spent[name] = np.zeros(rounds)
        for turn in range(rounds):
            end = length + 3 * turn
            start = time.thread_time()
            # As the proposer does: older tokens, this step's, the one just emitted.
            parts = ([text[: end - 3], text[end - 3 : end - 1], text[end - 1 : end]] for text in texts)
            now = [np.concatenate(part) for part in parts]
            for source in sources if others else ():
                if isinstance(source, SuffixSource) and source.cache is not None:
                    source.cache.update({str(i): tokens[length // 2 :] for i, tokens in enumerate(now)})
            for tokens in now:
                propose(sources, tokens, MAX_LENGTH, [2])
            spent[name][turn] = (time.thread_time() - start) / batch
    return spent


def memory(batch: int, length: int) -> dict[str, int]:
    """Bytes of the search: on V1 what is held between rounds, and at most within one; on V2 what its tensors hold."""
    from vllm_specdecpp.engine.v2.free_runs import DeviceFreeRuns

    texts = [_edits(np.random.default_rng(i), length) for i in range(batch)]
    tracemalloc.start()
    sources = make_sources(list(RUN_SOURCES))
    before = tracemalloc.get_traced_memory()[0]
    for text in texts:
        propose(sources, np.concatenate([text, text[:1]]), MAX_LENGTH)
    held, peak = (traced - before for traced in tracemalloc.get_traced_memory())
    tracemalloc.stop()
    device = DeviceFreeRuns(
        SimpleNamespace(max_num_reqs=batch, num_speculative_steps=MAX_LENGTH, device=torch.device("cpu"))
    )
    tensors = [value for value in vars(device).values() if isinstance(value, torch.Tensor)]
    return {"held": held, "peak": peak, "device": sum(tensor.nbytes for tensor in tensors)}


def report_search(batches: list[int], length: int, rounds: int, others: bool = False) -> None:
    """Print :func:`search` and, without ``others``, :func:`memory`, and as the last line all of it as JSON."""
    print(f"{'batch':>5} {'tokens':>6} {'text':>14} {'median':>8} {'p95':>8}   (us a round and request)")
    rows = []
    for batch in batches:
        for name, spent in search(batch, length, rounds, others=others).items():
            median, p95 = (round(float(np.quantile(spent, q)) * 1e6, 1) for q in (0.5, 0.95))
            print(f"{batch:5d} {length:6d} {name:>14} {median:8.1f} {p95:8.1f}")
            rows.append({"batch": batch, "tokens": length, "text": name, "median": median, "p95": p95})
        if others:
            continue
        found = memory(batch, length)
        print(
            f"{batch:5d} {length:6d} memory: V1 holds {found['held']} bytes between rounds, at most"
            f" {found['peak'] / 1024:.0f} KiB within one; V2 holds {found['device'] / 1024:.1f} KiB on the device"
        )
        rows.append({"batch": batch, "tokens": length, "bytes": found})
    print(json.dumps({"search": rows} | provenance.versions()))


def main(argv: list[str] | None = None) -> int:
    """Print microseconds a round by part, and as the last line all of it as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulate.overhead", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="requests in the batch")
    parser.add_argument("--passes", type=int, default=5, help="draft passes a round, at most")
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--round-ms", type=float, default=250.0, help="length of a round that the share is of")
    parser.add_argument("--warm", action="store_true", help="leave the processor's caches as they are")
    parser.add_argument("--v2", action="store_true", help="the host's part on Model Runner V2")
    parser.add_argument("--runs", action="store_true", help="time the search for free runs instead")
    parser.add_argument("--others", action="store_true", help="with --runs: in other requests' outputs, too")
    parser.add_argument("--tokens", type=int, default=32_768, help="of each request, with --runs")
    options = parser.parse_args(argv)
    if min(*options.batches, options.passes, options.rounds) < 1 or options.tokens < 8:
        print(
            "benchmarks.simulate.overhead: --batches, --passes and --rounds must be 1 or more, --tokens 8 or more",
            file=sys.stderr,
        )
        return 2
    if options.runs:
        report_search(options.batches, options.tokens, options.rounds, options.others)
        return 0
    parts, timed = (PARTS_V2, measure_v2) if options.v2 else (PARTS, measure)
    heads = "".join(f" {name:>8}" for name in (*parts, "sum", "p95", "least"))
    print(f"{'batch':>5} {'passes':>6}{heads}   share  (us a round)")
    results = []
    for batch in options.batches:
        spent, num_passes = timed(batch, options.passes, options.rounds, not options.warm)
        total = sum(spent.values(), np.zeros(options.rounds))
        row = {part: round(float(np.median(spent[part])) * 1e6, 1) for part in parts}
        row |= {"sum": round(float(np.median(total)) * 1e6, 1), "p95": round(float(np.quantile(total, 0.95)) * 1e6, 1)}
        row["least"] = round(float(total.min()) * 1e6, 1)
        share = row["sum"] / (options.round_ms * 1e3)
        numbers = "".join(f" {value:8.0f}" for value in row.values())
        print(f"{batch:5d} {num_passes.mean():6.2f}{numbers}  {share:6.2%}")
        results.append({"batch": batch, "passes": round(float(num_passes.mean()), 2), **row, "share": round(share, 5)})
    print(json.dumps({"rows": results, "round_ms": options.round_ms, "cold": not options.warm} | provenance.versions()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
