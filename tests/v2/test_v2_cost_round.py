# SPDX-License-Identifier: Apache-2.0
"""The device's round under the cost-aware rule takes the decisions of the rule's own steps, and reports what it did."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.v2.kernels.cost_aware_cases import Case, make_round, oracle_of
from tests.v2.test_v2_round import HIDDEN, VOCAB, _head
from vllm_specdecpp.decision import tails
from vllm_specdecpp.decision.cost_aware import CostModel
from vllm_specdecpp.decision.cost_aware.admission import Admitted
from vllm_specdecpp.decision.cost_aware.tail import CostAwareTail
from vllm_specdecpp.decision.estimator import ConfidenceEstimator, Estimator, HeadEstimator
from vllm_specdecpp.kernels.cost_aware_tail import cost_aware_tail

PADDING, STOP = 3, 3
CASES = [
    Case(1, hasty=1.3), Case(2, hasty=0.8), Case(7), Case(33, hasty=1.5), Case(4, hasty=0.0),
    Case(4, hasty=4.0), Case(8, hasty=2.5), Case(9, lag=1), Case(1, lag=1), Case(5, lag=1, hasty=2.0),
    Case(3, limit=0),
]  # fmt: skip


def _estimator(lag: int) -> Estimator:
    """Training-free, or the paper's head."""
    return HeadEstimator(_head()) if lag else ConfidenceEstimator()


class _Twins:
    """The same round on the host and on the device, with a rule each."""

    def __init__(self, case: Case, seed: int, twin: bool) -> None:
        from vllm_specdecpp.engine.v2.cost_aware import DeviceCostAware
        from vllm_specdecpp.engine.v2.round import DeviceRound

        self.rng = np.random.default_rng(seed)
        self.met: set[str] = set()
        self.n, self.most = case.num_reqs, case.num_reqs + PADDING
        begun = make_round(case, self.rng)
        rule: Any = begun.rule
        costs = rule.costs
        tokens = len(costs.verify.table()) - 1
        rule.costs = CostModel(**costs.points(), max_reqs=self.most, max_tokens=tokens)
        begun.admitted = Admitted(begun.drafts, begun.price, 1.0, expected=1.0)
        self.host = copy.deepcopy(begun)
        self.estimator = _estimator(case.lag)
        rule.begin = lambda *args: begun
        tail = CostAwareTail(self.estimator, self.most, case.max_length, tokens, "cpu", cost_aware_tail)
        if twin:
            tail._launch = tails.cost_aware_tail
        self.costs: Any = DeviceCostAware(rule, tail, None, lambda tensor: tensor, torch.device("cpu"))
        self.device: Any = DeviceRound(
            torch.full((self.most, case.max_length), -7), torch.empty(self.most, case.max_length)
        )
        device = self.device
        device.set_rule(tail, 1)
        # What there is room for, which the host's plan does not know.
        room = torch.from_numpy(self.rng.integers(0, 2 * case.max_length, self.most)).clamp(max=case.max_length)
        device.limits[:, 0], device.limits[:, 1], device.limits[:, 2:] = room, 1000, -1
        device.limits[::2, 5] = STOP
        self.host.limits = np.minimum(self.host.limits, room[: self.n].numpy())
        self.host.drafts = self.host.drafts & (self.host.limits > 0)
        self.host.running = self.host.drafts.copy()
        self.oracle = oracle_of(self.host)

    def start(self) -> None:
        lens = torch.full((self.most,), 20, dtype=torch.int32)
        self.device.start(self.n, lens, lens * 0, lens * 0 + 1)
        self.costs.verified(self.host.request_ids, [False] * self.n, lens, lens)
        self.costs.begin_round(self.host.request_ids, *[[0] * self.n] * 6)
        self.device.admit()

    def step(self, k: int) -> bool:
        """One candidate of each; False if float32 may decide otherwise."""
        n, device, host = self.n, self.device, self.host
        seed = torch.Generator().manual_seed(int(self.rng.integers(1 << 30)))
        logits = torch.randn(self.most, VOCAB, generator=seed) * torch.rand(self.most, 1, generator=seed) * 9
        hidden = torch.randn(self.most, HIDDEN, generator=seed)
        if k == 2:
            hidden[0] = torch.nan  # a broken head is no score
        tokens = torch.multinomial(logits.softmax(-1), 1, generator=seed).squeeze(1)
        tokens[torch.rand(self.most, generator=seed) < 0.1] = STOP
        device.observe_pass(k, logits, hidden)
        scores = device.scores[:n].double().numpy() if device._scored else np.full(n, np.nan)
        if self.oracle.step(scores.tolist()).fragile:
            return False
        ran, before = host.running.copy(), host.lengths.copy()
        host.step(scores)
        submit = host.lengths > before
        ends = (device.limits[:n, 2:] == tokens[:n, None]).any(dim=1).numpy()
        host.end(ends)
        self.oracle.end(ends)
        column = device.append_drawn(tokens)
        assert column.tolist() == [*np.where(submit, tokens[:n], -1).tolist(), *[-1] * PADDING]
        assert device.running.tolist() == [*host.running.tolist(), *[False] * PADDING]
        assert bool(device.any_running) == host.running.any()
        np.testing.assert_allclose(device.survival[:n], host.survival, rtol=1e-4)
        confidences = device.confidences[:n, :k]
        assert (confidences[~submit, k - 1] == 0).all()
        known = confidences[:, : k - host.rule.lag]
        torch.testing.assert_close(
            known.prod(dim=1)[submit], device.survival[:n][submit], rtol=1e-4, atol=1e-6
        )  # fmt: skip
        seen = {"dropped": ran & ~submit, "last": submit & ~host.running}
        self.met |= {name for name, rows in seen.items() if rows.any()}
        return True

    def check_what_is_learnt(self) -> None:
        """The device's round comes back, and teaches its rule what the host's teaches the other."""
        told: list[Any] = []
        finish = self.costs.rule.finish

        def spy(*args: Any) -> None:
            told.append(args)
            finish(*args)

        self.costs.rule.finish = spy
        self.costs.drafted([], self.n, self.device.lengths)
        submitted = self.host.lengths
        accepted = self.rng.integers(0, submitted + 1)
        sampled = torch.tensor([*accepted + 1, *[0] * PADDING])
        rejected = torch.tensor([*submitted - accepted, *[0] * PADDING])
        self.costs.verified(self.host.request_ids, [False] * self.n, sampled, rejected)
        ((round_, verified, wins, *_),) = told
        host: Any = self.host
        rule = host.rule
        assert round_.widths == [width for width in host.widths if width]
        assert (round_.lengths == host.lengths).all() and (round_.drafts == host.drafts).all()
        assert (round_.limits == np.where(host.drafts, host.limits, 0)).all()
        np.testing.assert_allclose(round_.expected, host.expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(
            np.reshape(round_.scores, (-1, self.n)), np.reshape(host.scores[: len(round_.widths)], (-1, self.n)),
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip
        assert (verified, wins) == (submitted.tolist(), accepted.tolist())
        host.widths = round_.widths
        rule.finish(host, verified, wins)
        learnt = self.costs.rule
        for name in ("this", "next"):
            mine, theirs = (getattr(model.acceptance, name).theta for model in (learnt, rule))
            np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4)
        mine, theirs = learnt.admission, rule.admission
        for one, other in zip(mine.records.of(host.request_ids), theirs.records.of(host.request_ids), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4)
        assert mine.records.known == pytest.approx(theirs.records.known, rel=1e-4)
        assert mine.correction == pytest.approx(theirs.correction, rel=1e-4)
        assert learnt.purse.balance == pytest.approx(rule.purse.balance, rel=1e-4)


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_decisions_equal_the_hosts(case):
    """By the torch tail, which is quicker than the interpreted kernel; once in each case by the kernel."""
    whole = 0
    met: set[str] = set()
    for seed in range(4):
        twins = _Twins(case, 100 + seed, twin=seed > 0)
        twins.start()
        steps = range(1, case.max_length + 1)
        if all(twins.step(k) for k in steps if k == 1 or twins.host.running.any()):
            whole += 1
            twins.check_what_is_learnt()
        met |= twins.met
    assert whole >= 2
    assert "last" in met or case.limit == 0


def test_where_the_host_runs_ahead_it_plans_with_what_it_knows():
    """A prompt that this step does not end drafts nothing; where a request stands is known to the device alone."""
    from vllm_specdecpp.engine.v2.speculator import SpecDecPPSpeculator

    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"))
    batch = SimpleNamespace(
        is_prefilling_np=np.array([True, True, False]), num_computed_prefill_tokens_np=np.array([0, 10, 30]),
        num_scheduled_tokens=np.array([20, 20, 4]), prefill_len_np=np.array([30, 30, 30]),
    )  # fmt: skip
    limits = np.array([[6, 99], [4, 99], [5, 99]])
    assert SpecDecPPSpeculator._known_room(on_gpu, batch, limits) == [0, 4, 5]
    on_cpu: Any = SimpleNamespace(
        device=torch.device("cpu"), round=SimpleNamespace(max_lengths=torch.tensor([0, 2, 1, 9]))
    )  # fmt: skip
    assert SpecDecPPSpeculator._known_room(on_cpu, SimpleNamespace(num_reqs=3), limits) == [0, 2, 1]
