# SPDX-License-Identifier: Apache-2.0
"""Rounds for cost_aware_tail, and the comparison with the oracle, which tries out everything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import numpy as np
import torch

from tests.cost_aware_oracle import Oracle, Step
from tests.standings import believed
from vllm_specdecpp.decision.cost_aware import CostAwareRule, CostModel
from vllm_specdecpp.decision.cost_aware.admission import Admitted
from vllm_specdecpp.decision.cost_aware.drafting import CostAwareRound
from vllm_specdecpp.decision.cost_aware.free_runs import Taken
from vllm_specdecpp.decision.cost_aware.logistic import BUCKETS, NUM_BUCKETS
from vllm_specdecpp.decision.tail_params import CostAwareParams

VOCAB = 12  # small: stop tokens are drawn


@dataclass(frozen=True)
class Case:
    """One round's shape."""

    num_reqs: int
    max_length: int = 6
    num_stop: int = 1
    lag: int = 0
    hasty: float = 1.0
    """Factor on the price: above 1 time is dear; 0: it costs nothing."""
    limit: int | None = None
    nan: float = 0.1
    alike: bool = False
    """All scores are the same."""
    padding: int = 3
    """Rows of a captured batch behind its requests."""

    def __str__(self) -> str:
        odd = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return ",".join(odd)


CASES = [
    Case(1, max_length=1),
    Case(1, num_stop=0, nan=0.0),
    Case(1, hasty=3.0),
    Case(1, hasty=1.5, padding=0),
    Case(1, hasty=3.0, padding=0, lag=1),
    Case(2, hasty=1.5),
    Case(2, lag=1, max_length=10, hasty=0.7, nan=0.6),
    Case(6, alike=True, hasty=1.5),
    Case(1, lag=1, hasty=3.0),
    Case(1, lag=1, hasty=0.0, num_stop=2),
    Case(2, lag=1, num_stop=3),
    Case(3, hasty=2.0),
    Case(4, hasty=4.0),
    Case(5, limit=0),
    Case(5, hasty=0.0),
    Case(7, nan=1.0),
    Case(8, hasty=2.5, num_stop=6),
    Case(16, lag=1, max_length=9),
    Case(33, hasty=1.4),
    Case(70, lag=1, max_length=3, hasty=0.0),
    Case(130, max_length=3),
]


def make_round(case: Case, rng: np.random.Generator) -> CostAwareRound:
    """A rule with odd costs and a learnt calibration, and a round of it that some requests sit out."""
    n, bumps = case.num_reqs, rng.uniform(0.9, 1.1, 2 * case.num_reqs + 10)
    verify = {w: float((0.05 + 0.0008 * w) * bumps[w]) for w in range(1, 2 * n + 6)}  # ends early: extrapolated
    step = {w: float((0.006 + 0.0002 * w) * bumps[-w]) for w in range(1, n + 1)}
    costs = believed(CostModel(step, step, verify, max_reqs=n + case.padding, max_tokens=len(verify)))
    rule = CostAwareRule(costs, case.max_length, lag=case.lag)
    for model in (rule.acceptance.this, rule.acceptance.next):
        model.theta = model.theta + rng.normal(0, 0.6, len(model.theta))
        model.theta[0] = max(0.0, model.theta[0])
    rule.acceptance.means = rng.uniform(0.3, 0.95, NUM_BUCKETS)
    top = case.max_length if case.limit is None else case.limit
    limits = rng.integers(0 if n > 1 or not top else 1, top + 1, n)
    drafts = (limits > 0) & (rng.random(n) < (0.9 if n > 1 else 1.0))
    price = case.hasty * _tokens_per_second(rule.costs, n, case.max_length) * rng.uniform(0.7, 1.4)
    sits_out = np.where(drafts, 0, np.arange(n) % 4)
    free = Taken([None] * n, sits_out, np.zeros(n))
    admitted = Admitted(drafts, price, price, levels=np.random.default_rng(n).normal(0, 1, n))
    return CostAwareRound(rule, [str(i) for i in range(n)], limits, drafts, price, admitted, free)


def _tokens_per_second(costs: CostModel, num_reqs: int, max_length: int) -> float:
    """Of the best fixed candidate length, where 7 of 10 candidates are right."""
    tokens = num_reqs * np.add.accumulate(0.7 ** np.arange(max_length + 1))
    return float((tokens / costs.fixed_seconds(num_reqs, max_length)).max())


def load_params(round_: CostAwareRound, padding: int = 3) -> CostAwareParams:
    """The device's parameters of this round."""
    rule = round_.rule
    max_tokens = len(rule.costs.verify.table()) - 1
    params = CostAwareParams.allocate(len(round_.limits) + padding, rule.max_length, max_tokens, BUCKETS, "cpu")
    round_.load(params)
    return params


def arguments(round_: CostAwareRound, case: Case, rng: np.random.Generator) -> dict[str, Any]:
    """Fresh tensors of a round, in the launcher's names, with rows of padding behind the requests."""
    n, k = case.num_reqs + case.padding, case.max_length
    stops = torch.from_numpy(rng.integers(0, VOCAB, (n, case.num_stop)))
    stops[torch.from_numpy(rng.random((n, case.num_stop)) < 0.4)] = -1
    running = torch.zeros(n, dtype=torch.int32)
    running[: case.num_reqs] = torch.from_numpy(round_.drafts).int()
    return {
        "survival": torch.ones(n), "expected": torch.zeros(n), "lengths": torch.zeros(n, dtype=torch.int32),
        "running": running, "params": load_params(round_, case.padding), "stop_token_ids": stops,
        "draft_tokens": torch.full((n, k + 3), 99)[:, :k], "any_running": torch.full((1,), 7, dtype=torch.int32),
        "scores_log": torch.zeros(k, n + 2)[:, :n], "widths": torch.full((k,), -1, dtype=torch.int32),
        "lag": case.lag,
    }  # fmt: skip


def oracle_of(round_: CostAwareRound) -> Oracle:
    """The same round, to be decided by trying out everything."""
    rule = round_.rule
    return Oracle(
        limits=round_.limits.tolist(), drafts=round_.drafts.tolist(), price=round_.price, lag=rule.lag,
        this=rule.acceptance.this.theta.tolist(), next=rule.acceptance.next.theta.tolist(),
        means=rule.acceptance.means.tolist(), bucket_of=lambda position: BUCKETS[position],
        step=cache(rule.costs.step.at), verify=cache(rule.costs.verify.at), free_rows=int(round_.free.lengths.sum()),
        levels=round_.levels.tolist(),
    )  # fmt: skip


def check_rounds(launch: Any, case: Case, seeds: Iterable[int] = range(6)) -> Counter[str]:
    """Run rounds by ``launch`` and by the oracle; after each step all must agree. Returns what was met how often.

    A step whose decision hangs on less than float32 tells apart is not compared; the oracle's state goes on from there.
    """
    met: Counter[str] = Counter()
    for seed in seeds:
        rng = np.random.default_rng(1000 + seed)
        round_ = make_round(case, rng)
        oracle = oracle_of(round_)
        a = arguments(round_, case, rng)
        for step in range(1, case.max_length + 1):
            scores, token_ids = _scores(case, rng), rng.integers(0, VOCAB, case.num_reqs + case.padding)
            running = list(oracle.running)
            made = oracle.step(scores[: case.num_reqs].tolist())
            stops = a["stop_token_ids"].numpy()[: case.num_reqs]
            oracle.end((token_ids[: case.num_reqs, None] == stops).any(axis=1))
            if made.fragile:
                met["fragile"] += 1
                _follow(a, oracle)
                continue
            launch(torch.from_numpy(scores).float(), torch.from_numpy(token_ids), step, **a)
            _compare(a, oracle, made, token_ids, step, f"{case} seed {seed} step {step}")
            met += _events(running, made)
    return met


SOON = [(Case(6, alike=True, hasty=1.5), 4), (Case(3, hasty=2.0), 0), (Case(7, nan=1.0), 0), (CASES[4], 0)]
"""Cases and seeds that show what else shows late."""


def check_small(launch: Any) -> None:
    """All that a planted bug must fail: every case of few requests once, then again; most bugs show soon."""
    check_free(launch)
    for case, seed in SOON:
        check_rounds(launch, case, [seed])
    for seed in range(5):
        for case in CASES:
            if case.num_reqs <= 16:
                check_rounds(launch, case, [seed])


def check_free(launch: Any) -> None:
    """At price 0 all draft to their limits and submit everything, though nothing can be accepted."""
    for case in (Case(1, num_stop=0), Case(1, num_stop=0, padding=0), Case(5, num_stop=0)):
        round_ = make_round(case, np.random.default_rng(0))
        round_.price, round_.limits[:], round_.drafts[:] = 0.0, [6, 2, 5, 1, 4][: case.num_reqs], True
        a = arguments(round_, case, np.random.default_rng(0))
        for intercepts in (a["params"].this, a["params"].next):
            intercepts.fill_(-500.0)
        for step in range(1, 7):
            launch(torch.zeros(case.num_reqs + case.padding), torch.arange(case.num_reqs + case.padding), step, **a)
        assert a["lengths"].tolist() == [*round_.limits, *[0] * case.padding]
        assert (a["draft_tokens"] >= 0).sum(dim=1).tolist() == a["lengths"].tolist()
        assert not a["survival"][: case.num_reqs].any() and not a["running"].any()


def _follow(a: dict[str, Any], oracle: Oracle) -> None:
    for name in ("survival", "expected", "lengths", "running"):
        a[name][: len(oracle.limits)] = torch.tensor(getattr(oracle, name)).to(a[name].dtype)


def _compare(a: dict[str, Any], oracle: Oracle, made: Step, token_ids: Any, step: int, where: str) -> None:
    n = len(oracle.limits)
    padding = len(a["lengths"]) - n
    assert a["widths"][step - 1] == oracle.widths[-1], where
    np.testing.assert_allclose(a["scores_log"][step - 1, :n], oracle.log[-1], rtol=1e-4, atol=1e-5, err_msg=where)
    assert bool(a["scores_log"][step - 1, n:].isnan().all()), where
    np.testing.assert_allclose(a["survival"][:n], oracle.survival, rtol=1e-4, err_msg=where)
    assert a["lengths"].tolist() == [*oracle.lengths, *[0] * padding], where
    np.testing.assert_allclose(a["expected"][:n], oracle.expected, rtol=1e-4, atol=1e-6, err_msg=where)
    drafts = np.where(made.submit, token_ids[:n], -1)
    assert a["draft_tokens"][:, step - 1].tolist() == [*drafts, *[-1] * padding], where
    assert a["running"].tolist() == [*oracle.running, *[0] * padding], where
    assert a["any_running"].tolist() == [any(oracle.running)], where


def _events(running: list[bool], made: Step) -> Counter[str]:
    met = Counter(steps=1)
    if any(running):
        met["all go on"] += made.go_on == running
        met["some go on"] += any(made.go_on) and made.go_on != running
        met["nobody goes on"] += not any(made.go_on)
        met["dropped"] += made.submit != running
        met["last submitted"] += made.submit != made.go_on and any(made.submit)
    return met


def _scores(case: Case, rng: np.random.Generator) -> Any:
    scores = rng.beta(3, 1.2, case.num_reqs + case.padding)
    if case.alike:
        return np.full(len(scores), float(np.float32(scores[0])))
    odd = rng.random(len(scores))
    scores[odd < case.nan] = np.nan
    beyond = (odd >= case.nan) & (odd < 1.5 * case.nan)
    scores[beyond] = rng.choice([-0.5, 1.5, np.inf, -np.inf, 0.0, 1.0], int(beyond.sum()))
    return scores.astype(np.float32).astype(np.float64)
