# SPDX-License-Identifier: Apache-2.0
"""Rules that the simulator plays: cost_aware as the engine plays it, and one that knows the costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.simulate_server import Run, Server, Standing
from benchmarks.simulate_settings import true_costs
from benchmarks.simulated_streams import DEPTH, Stream
from vllm_specdecpp.costs.model import CostModel
from vllm_specdecpp.decision.cost_aware.drafting import CostAwareRound
from vllm_specdecpp.decision.cost_aware.online import AcceptanceModel, logit
from vllm_specdecpp.decision.cost_aware.rule import CostAwareRule
from vllm_specdecpp.engine.shared.cost_aware import CostAwareDrafting
from vllm_specdecpp.engine.v1.inputs import RowState


class Engine:
    """The default rule with what the engine adds to it: reading is paid for first, by ``CostAwareDrafting``."""

    def __init__(self, costs: CostModel, rule: CostAwareRule | None = None) -> None:
        self.rule = rule or CostAwareRule(costs, DEPTH)
        self.lag = self.rule.lag
        nothing: Any = None  # tail, file, agree: not used by what is called here
        self._engine = CostAwareDrafting(self.rule, nothing, None, nothing, torch.device("cpu"))
        self._read = 0  # tokens that the first pass of this round reads, if more than usual

    def begin(self, standings: Sequence[Standing]) -> CostAwareRound:
        limits = [s.limit for s in standings]
        round_ = self.rule.begin([s.request_id for s in standings], limits)
        rows = [RowState(s.request_id, 0, s.emitted) for s in standings]
        self._engine._output_lengths.update({s.request_id: s.emitted for s in standings})
        behind = [s.behind for s in standings]
        self._engine._leave_out(round_, rows, behind, [s.room for s in standings])
        if any(limits):
            self._engine.drafting = bool(round_.running.any())
        missing = int(np.array(behind)[round_.drafts].sum())
        self._read = missing and missing + 2 * int(round_.drafts.sum())
        return round_

    def finish(
        self, round_: CostAwareRound, verified: Sequence[int | None], accepted: Sequence[int],
        draft_seconds: float | None, verify_seconds: float | None,
    ) -> None:  # fmt: skip
        whole = verify_seconds is not None and None not in verified
        if self._read and draft_seconds is not None:
            self.rule.costs.observe_reading_round(round_.widths, draft_seconds, [self._read])
        drafted = draft_seconds if whole and not self._read else None
        self.rule.finish(round_, verified, accepted, drafted, verify_seconds if whole else None)

    def state(self) -> dict[str, Any]:
        """What the engine keeps for the next start: the costs."""
        points = self.rule.costs.points()
        return {name: {str(width): s for width, s in curve.items()} for name, curve in points.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up :meth:`state`."""
        curves = [{int(width): s for width, s in state[name].items()} for name in ("first", "step", "verify", "read")]
        old = self.rule.costs
        self.rule.costs = CostModel(*curves, max_reqs=old.first.max_width, max_tokens=old.verify.max_width)


RULES: dict[str, Callable[[CostModel], Any]] = {"cost_aware": Engine}
"""Name -> a rule for an engine that starts with these measured costs."""


class Informed:
    """Knows costs, calibration and rho, and learns nothing; drafts for every request in every round."""

    def __init__(self, costs: CostModel, acceptance: AcceptanceModel, rho: float, lag: int = 0) -> None:
        self.rule = CostAwareRule(costs, DEPTH, lag=lag, acceptance=acceptance, guarded=False)
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
