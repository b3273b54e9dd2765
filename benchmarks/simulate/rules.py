# SPDX-License-Identifier: Apache-2.0
"""Rules that the simulator plays: cost_aware, and one that knows the costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.simulate.server import Run, Server
from benchmarks.simulate.settings import true_costs
from benchmarks.simulate.streams import DEPTH, Stream
from vllm_specdecpp.costs.model import CostModel
from vllm_specdecpp.decision.cost_aware.acceptance import AcceptanceModel, logit
from vllm_specdecpp.decision.cost_aware.admission import Standing
from vllm_specdecpp.decision.cost_aware.drafting import CostAwareRound
from vllm_specdecpp.decision.cost_aware.rule import CostAwareRule

RULES: dict[str, Callable[[CostModel], Any]] = {"cost_aware": lambda costs: CostAwareRule(costs, DEPTH)}
"""Name -> a rule for an engine that starts with these measured costs."""


class Informed:
    """Knows costs, calibration and rho, and learns nothing; drafts for every request in every round."""

    def __init__(self, costs: CostModel, acceptance: AcceptanceModel, rho: float, lag: int = 0) -> None:
        self.rule = CostAwareRule(costs, DEPTH, lag=lag, acceptance=acceptance)
        self.lag, self.rho = lag, rho

    def begin(self, standings: Sequence[Standing]) -> CostAwareRound:
        limits = np.array([s.limit for s in standings])
        ids = [s.request_id for s in standings]
        return CostAwareRound(self.rule, ids, limits, limits > 0, self.rho)

    def finish(self, *args: object) -> None:
        """Learns nothing."""


class Off:
    """Drafts nothing."""

    lag = 0

    def begin(self, standings: Sequence[Standing]) -> Any:
        nobody = np.zeros(len(standings), dtype=np.int64)
        return _Nothing(nobody > 0, nobody, nobody > 0, [])

    def finish(self, *args: object) -> None:
        """Learns nothing."""


class _Nothing:
    def __init__(self, running: Any, lengths: Any, drafts: Any, widths: list[int]) -> None:
        self.running, self.lengths, self.drafts, self.widths = running, lengths, drafts, widths
        self.trial = False


def informed_run(server: Server, acceptance: AcceptanceModel, fixed: float, known: float) -> Run:
    """The informed rule's, with the rate of the best fixed K as its rho, or what that brought.

    Too high a rho makes it stop where only longer drafts would pay. A second run is made where the first brought less
    than is ``known`` to be possible.
    """
    costs = true_costs(server.setting)
    run = server.play(Informed(costs, acceptance, fixed), 0)
    if run.rate >= known:
        return run
    return max(run, server.play(Informed(costs, acceptance, run.rate), 0), key=lambda one: one.rate)


def calibrated(streams: Sequence[Stream]) -> AcceptanceModel:
    """A calibration from streams served with the longest candidate lengths; nothing is forgotten."""
    model = AcceptanceModel(memory=1e9)
    for stream in streams:
        at, x = 0, logit(stream.scores)
        while at < len(stream):
            accepted = int(stream.run[at])
            model.update_run(x[at].tolist(), accepted, DEPTH)
            at += accepted + 1
    return model
