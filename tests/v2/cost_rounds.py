# SPDX-License-Identifier: Apache-2.0
"""The cost-aware rule in the oracle harness: a script says who drafts, and the play knows what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tests.v2 import harness
from tests.v2.oracle import Stops, predict
from tests.v2.play import Play
from vllm_specdecpp.decision import tails
from vllm_specdecpp.decision.cost_aware import CostAwareRule, CostModel
from vllm_specdecpp.decision.cost_aware.admission import Admitted, Standing
from vllm_specdecpp.decision.cost_aware.drafting import CostAwareRound
from vllm_specdecpp.decision.cost_aware.free_runs import Taken
from vllm_specdecpp.engine.v2.passes import SHORT
from vllm_specdecpp.source_registry import make_sources

MAX_LENGTH = 5
CURVES = {"first": {1: 1e-3, 4: 2e-3}, "step": {1: 1e-3}, "verify": {1: 20e-3, 64: 22e-3}}


@dataclass
class Told:
    """What the rule was told of a round; the round as it was then."""

    round_: CostAwareRound
    verified: list[int | None]
    accepted: list[int]
    draft_seconds: float | None
    verify_seconds: float | None
    read: list[int]
    """Tokens of each pass that read, if that was more than the usual two a request."""


class Script(CostAwareRule):
    """Begins rounds of random lengths, in which nobody, some or all draft. Remembers what it is told.

    Attributes:
        plans: request id -> length, of each round begun.
        chance: that a request drafts in a round in which somebody may.
        drafted: share of these rounds.
    """

    chance, drafted = 0.8, 0.7

    def __init__(self, seed: int, max_reqs: int, sources: Sequence[str] = (), **curves: dict[int, float]) -> None:
        costs = CostModel(**(CURVES | curves), max_reqs=max_reqs, max_tokens=256)
        super().__init__(costs, MAX_LENGTH, sources=make_sources(sources))
        self._random = np.random.default_rng(seed)
        self.plans: list[dict[str, int]] = []
        self.told: list[Told] = []

    def begin(self, batch: Sequence[Standing], runs: Any = ()) -> CostAwareRound:
        names = [s.request_id for s in batch]
        most = np.array([min(s.limit, MAX_LENGTH) for s in batch], dtype=np.int64)
        limits = np.minimum(most, self._random.integers(0, MAX_LENGTH + 1, len(batch)))
        drafts = (limits > 0) & (self._random.random(len(batch)) < self.chance) & (self._random.random() < self.drafted)
        self.plans.append(dict(zip(names, np.where(drafts, limits, 0).tolist(), strict=True)))
        return CostAwareRound(self, names, limits, drafts, 0.0, Admitted(drafts, 0.0, 1.0))

    def finish(
        self, round_: CostAwareRound, verified: Any, accepted: Any, draft_seconds: Any = None,
        verify_seconds: Any = None, read: Any = (),
    ) -> None:  # fmt: skip
        self.told.append(Told(round_, list(verified), list(accepted), draft_seconds, verify_seconds, list(read)))
        if self.sources:  # the runs that are taken must not depend on the times of this machine
            draft_seconds = verify_seconds = None
        super().finish(round_, verified, accepted, draft_seconds, verify_seconds, read)


@dataclass
class Truth:
    """A round as the play saw it."""

    plan: dict[str, int]
    is_short: bool
    read: list[int] = field(default_factory=list)  # tokens of each pass that read, if more than two a request
    drafts: list[list[float]] = field(default_factory=list)  # by row: the confidence of each candidate
    runs: list[int] = field(default_factory=list)  # by row: candidates of a run
    taken: Taken | None = None  # what the rule would have taken
    outcomes: dict[str, tuple[int, int]] | None = None  # request id -> verified, accepted, in the next step
    next_names: list[str] = field(default_factory=list)


class ScriptedPlay(Play):
    """Compares every draft with the oracle's own continuation, as long as the script says, and what the rule is told
    of a round with what became of it.

    Args:
        speculator, vllm_config, seed, scheduler: as in :class:`Play`.
        plans: of rank 0's play with the same seed, for a rank that follows; None: of the speculator's own rule.
    """

    def __init__(self, speculator: Any, vllm_config: Any, seed: int, *, plans: Any = None, **scheduler: bool) -> None:
        super().__init__(speculator, vllm_config, Stops(2.0), seed, **scheduler)
        self._rule: Script = speculator.cost_aware.rule
        self._plans = self._rule.plans if plans is None else plans
        self.truths: list[Truth] = []
        self._began = False
        self.num_checked = 0

    def _target(self, names: list[str]) -> Any:
        before = {}
        for name, request in self.requests.items():
            submitted = min(int(self.speculator.submitted[request.state]), len(request.drafts))
            before[name] = submitted, request.num_read >= request.prefill
        batch, num_sampled, num_rejected = super()._target(names)
        if self.truths and self.truths[-1].outcomes is None:
            last, wins = self.truths[-1], (num_sampled - 1).tolist()
            last.next_names = list(names)
            last.outcomes = {
                name: (before[name][0], won)
                for name, won in zip(names, wins, strict=True)
                if before[name][1] and name in last.plan
            }
        return batch, num_sampled, num_rejected

    def _propose(self, batch: Any, *args: Any) -> Any:
        handed = super()._propose(batch, *args)
        self._began = any(self.requests[name].cap != 0 for name in batch.req_ids)
        if self._began:
            plan = self._plans[len(self.truths)]
            assert list(plan) == batch.req_ids
            self.truths.append(Truth(plan, self.speculator._can_read_short(batch)))
        return handed

    def _planned(self, name: str) -> int:
        return self.truths[-1].plan[name] if self._began else 0

    def _reads(self, names: list[str]) -> bool:
        return self._began and any(self.truths[-1].plan.values())

    def _compare(self, names: list[str], handed: torch.Tensor, wanted: list[list[int]]) -> None:
        super()._compare(names, handed, wanted)
        if self._began:
            truth = self.truths[-1]
            if self._reads(names) and not (truth.is_short and not self.caught_up):
                first = SHORT * len(names) if truth.is_short else self.model.num_tokens[self.caught_up]
                truth.read = [*self.model.num_tokens[: self.caught_up], first]
            contexts = [self.requests[name].tokens for name in names]
            truth.drafts = [
                [predict([*context, *drafted[:k]])[1] for k in range(len(drafted))]
                for context, drafted in zip(contexts, self._drawn(wanted), strict=True)
            ]
            truth.runs = [len(all_) - len(mine) for all_, mine in zip(wanted, truth.drafts, strict=True)]
        if self._rule is not None:
            for index in range(self.num_checked, len(self._rule.told)):
                check(self._rule.told[index], self.truths[index])
            self.num_checked = len(self._rule.told)


def check(told: Told, truth: Truth) -> None:
    """The rule was told the truth of a round, and of no other one."""
    assert truth.outcomes is not None, "told of a round that nobody has verified"
    names, round_ = list(truth.plan), told.round_
    assert round_.request_ids == names
    drafted = [len(confidences) for confidences in truth.drafts]
    assert round_.lengths.tolist() == drafted and round_.free.lengths.tolist() == truth.runs
    assert round_.drafts.tolist() == [min(truth.plan[name], n) > 0 for name, n in zip(names, drafted, strict=True)]
    for run, wanted in zip(round_.free.runs, [] if truth.taken is None else truth.taken.runs, strict=False):
        assert run is None or wanted is not None and run.x.tolist() == wanted.x[: len(run.x)].tolist()
    if truth.taken is not None:
        np.testing.assert_allclose(round_.free.accepted, truth.taken.accepted, rtol=1e-4, atol=1e-6)
    assert round_.widths == [sum(n >= k for n in drafted) for k in range(1, max(drafted) + 1)]
    scores = np.reshape(round_.scores, (len(round_.widths), len(names)))
    for row, confidences in enumerate(truth.drafts):
        np.testing.assert_allclose(1 / (1 + np.exp(-scores[: len(confidences), row])), confidences, rtol=1e-4)
        assert np.isnan(scores[len(confidences) :, row]).all()
    known = [truth.outcomes.get(name) for name in names]
    assert told.verified == [None if outcome is None else outcome[0] for outcome in known]
    wins = [a for a, outcome in zip(told.accepted, known, strict=True) if outcome is not None]
    assert wins == [outcome[1] for outcome in known if outcome is not None]
    submitted = [mine + run for mine, run in zip(drafted, truth.runs, strict=True)]
    whole = told.verified == submitted and sorted(truth.next_names) == sorted(names)
    assert (told.verify_seconds is not None) == whole
    assert (told.draft_seconds is not None) == (any(drafted) or bool(truth.read))
    assert told.read == truth.read


def attach_script(speculator: Any, seed: int, *, leads: bool = True, **curves: dict[int, float]) -> Script | None:
    """Put a script in the place of the cost-aware rule; on a rank that follows, nothing."""
    from vllm_specdecpp.engine.v2.cost_aware import DeviceCostAware

    tail = speculator._tail
    rule = Script(seed, speculator.max_num_reqs, speculator.run_sources, **curves) if leads else None
    speculator.cost_aware = DeviceCostAware(rule, tail, None, speculator.agree, speculator.device)
    return rule


def scripted(tiny: Any, seed: int, *, leads: bool = True, **options: Any) -> tuple[Any, Any, Any]:
    """vLLM's configuration, a speculator over the oracle, and the script that says who drafts."""
    sources = ["draft_model"]
    options = {"rule": "cost_aware", "num_speculative_tokens": MAX_LENGTH, "sources": sources, **options}
    config, speculator = harness.speculator(tiny, **options)
    speculator._tail._launch = tails.cost_aware_tail  # quicker than the interpreted kernel
    return config, speculator, attach_script(speculator, seed, leads=leads)


def late_copies(monkeypatch: Any, by: int) -> None:
    """Let what the rule learns from arrive ``by`` steps later, as from a device that the host runs ahead of."""
    from vllm_specdecpp.engine.v2.cost_aware import DeviceCostAware
    from vllm_specdecpp.engine.v2.in_flight import HostCopy

    verified = DeviceCostAware.verified
    now = [0]

    def count(self: Any, *args: Any) -> None:
        now[0] += 1
        verified(self, *args)

    def is_here(self: Any) -> bool:
        return now[0] - self.sent >= by

    def wait(self: Any) -> None:
        self.sent = now[0] - by

    def read(self: Any) -> torch.Tensor:
        assert is_here(self), "read before it arrived"
        return self.source

    def write(self: Any, source: torch.Tensor) -> None:
        self.source, self.sent = source, now[0]

    monkeypatch.setattr(DeviceCostAware, "verified", count)
    monkeypatch.setattr(HostCopy, "is_here", is_here)
    monkeypatch.setattr(HostCopy, "wait", wait)
    monkeypatch.setattr(HostCopy, "tensor", property(read, write), raising=False)
