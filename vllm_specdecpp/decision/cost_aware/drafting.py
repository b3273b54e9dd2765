# SPDX-License-Identifier: Apache-2.0
"""One drafting phase under the cost-aware rule: what was decided before it, and what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_specdecpp.decision import tails
from vllm_specdecpp.decision.cost_aware.admission import Admitted
from vllm_specdecpp.decision.cost_aware.free_runs import Before, Taken
from vllm_specdecpp.decision.cost_aware.logistic import BUCKETS, Array, Mask
from vllm_specdecpp.decision.cost_aware.tail import Report
from vllm_specdecpp.decision.sources import Run
from vllm_specdecpp.decision.tail_params import CostAwareParams


class CostAwareRound:
    """One drafting phase: a limit for each request, and the price of a second.

    An engine decides in it with ``decision.round.DraftRound`` and fills it (:meth:`load`, :meth:`fill`). Where there
    are scores alone, as in a simulation, :meth:`step` plays it.

    Args:
        rule: whose costs and calibration count.
        request_ids: of the batch.
        limits: [num_reqs] the most candidates.
        drafts: [num_reqs] the requests that draft.
        price: tokens that a second of the round must bring; 0: all draft to their limits and submit all.
        admitted: why it was begun so.
        free: the runs of requests that do not draft; those of the others join them (:meth:`follow`).
        constrained: [num_reqs] as in :class:`Standing`; nobody, if it is not given.

    Attributes:
        alone: whether only constrained requests draft: their calibration is one of their own.
        acceptance: the calibration that counts.
        running: [num_reqs] requests that draw another candidate.
        lengths: [num_reqs] candidates drafted and submitted.
        survival: [num_reqs] estimated probability that all scored candidates are accepted.
        expected: [num_reqs] estimated number of accepted candidates.
        levels: [num_reqs] as ``Admitted.levels``.
        widths: requests in each draft pass so far.
        scores: of each pass, [num_reqs] log-odds as given, NaN: none.
    """

    def __init__(
        self, rule: Any, request_ids: list[str], limits: NDArray[np.int64], drafts: Mask, price: float,
        admitted: Admitted | None = None, free: Taken | None = None, constrained: Mask | None = None,
    ) -> None:  # fmt: skip
        self.rule, self.request_ids, self.limits, self.price = rule, request_ids, limits, price
        self.admitted, self.drafts, self.running = admitted, drafts, drafts.copy()
        num_reqs = len(request_ids)
        self.constrained: Mask = np.zeros(num_reqs, dtype=np.bool_) if constrained is None else constrained
        self.alone = bool(self.constrained.any() and drafts.any() and self.constrained[drafts].all())
        self.acceptance = rule.apart if self.alone else rule.acceptance
        self.lengths: NDArray[Any] = np.zeros(num_reqs, dtype=np.int32)
        self.survival, self.expected = np.ones(num_reqs, np.float32), np.zeros(num_reqs, np.float32)
        levels = None if admitted is None else admitted.levels
        self.levels = np.zeros(num_reqs) if levels is None else levels
        self.widths: list[int] = []
        self.scores: list[NDArray[np.float32]] = []
        self._state: dict[str, Any] = {}  # of the tail, once there was a step
        self.free = free or Taken([None] * num_reqs, np.zeros(num_reqs, np.int64), np.zeros(num_reqs))

    @property
    def submitted(self) -> NDArray[np.int64]:
        """[num_reqs] candidates, drafted or of a free run."""
        return self.lengths + self.free.lengths

    def outrun(self, row: int, runs: Sequence[Run], survival: float, accept: float, num_running: int) -> bool:
        """Whether a request is to stop drafting, since one of these runs goes on where its draft is.

        Another candidate of the draft model could at best stand in for the run's first one, with a chance a instead of
        c_1. That is worth its share of a draft pass only if

            S (a - c_1) (1 + c_2 + c_2 c_3 + ...)  >=  price step[n] / n

        Args:
            row: of the batch; the request has drawn a candidate, and would draw another.
            runs: that go on behind that candidate.
            survival, accept: S and a, of :func:`tails.standing`.
            num_running: n, requests that would draw another candidate.
        """
        if not runs or not self.price:
            return False
        known, name = self.rule.free_runs, self.request_ids[row]
        gain = survival * min(known.gain(run, name, accept) for run in runs)
        return bool(gain < self.price * self.rule.costs.step.at(num_running) / num_running)

    def follow(self, runs: Sequence[Sequence[Run]], survival: Array) -> None:
        """Let runs go on behind the drafts, as far as their rows pay; the steps are done, or :meth:`fill` was called.

        Args:
            runs: [num_reqs] that go on behind each request's candidates; empty for those that have not drafted.
            survival: [num_reqs] of :func:`tails.reach`.
        """
        costs, free = self.rule.costs, self.free
        rows = len(self.request_ids) + int(self.submitted.sum())
        tokens = len(self.request_ids) + float(self.expected.sum() + free.accepted.sum())
        before = Before(rows, tokens, costs.draft_seconds(self.widths), survival)
        limits = np.where(self.drafts, self.limits - self.lengths, 0)
        self.free = free.joined(self.rule.free_runs.take(self.request_ids, runs, limits, costs, before), self.drafts)

    @cached_property
    def looks(self) -> list[list[float]]:
        """[num_looks][num_reqs] log-odds of candidate 1, 2, ... as given, NaN: none; its steps are done."""
        return [column.tolist() for column in self.scores[self.rule.lag :]]

    @cached_property
    def estimates(self) -> list[list[float]]:
        """[num_looks][num_reqs] their acceptance, by the calibration in force when it is first asked for."""
        columns = np.array(self.scores[self.rule.lag :], dtype=np.float64)
        positions = np.arange(1, len(columns) + 1)[:, None]
        found: list[list[float]] = self.acceptance.accept(columns, positions).tolist() if len(columns) else []
        return found

    @property
    def trial(self) -> bool:
        """Whether somebody drafts that is not expected to gain by it."""
        return self.admitted is not None and self.admitted.trial

    def load(self, params: CostAwareParams) -> None:
        """Give the tail what it decides by in this round."""
        acceptance, costs, runs = self.acceptance, self.rule.costs, self.rule.free_runs
        params.load(
            limits=np.where(self.drafts, self.limits, 0), free_rows=int(self.free.lengths.sum()), price=self.price,
            levels=self.levels, this=acceptance.this.theta, next=acceptance.next.theta,
            means=acceptance.means, step_seconds=costs.step.upto(params.step_seconds.numel()),
            verify_seconds=costs.verify.upto(params.verify_seconds.numel()),
            first_seconds=costs.first.upto(params.first_seconds.numel()) if runs.models else (),
            runs=runs.theta, run_shifts=[runs.shift(name) for name in self.request_ids] if runs.models else (),
        )  # fmt: skip

    def fill(self, report: Report) -> None:
        """Take in what the tail has left, instead of steps."""
        self.limits, self.drafts = report.limits, report.drafts > 0
        self.widths = [width for width in report.widths.tolist() if width]  # nobody looks again once nobody has
        self.scores = list(report.scores[: len(self.widths)])
        self.lengths, self.expected = report.lengths, report.expected
        self.running = np.zeros(len(self.limits), dtype=np.bool_)

    @torch.inference_mode()
    def step(self, scores: Array | None) -> None:
        """Decide about candidate k and k + 1 of every running request, before candidate k is drawn.

        Args:
            scores: [num_reqs] in [0, 1], read where running: acceptance of candidate k (lag 0) or k - 1 (lag 1); NaN or
                None: no score.
        """
        if not self._state:
            self._open()
        given = np.full(len(self.lengths), np.nan) if scores is None else np.asarray(scores)
        self.widths.append(int(self.running.sum()))
        step = len(self.widths)
        tails.cost_aware_tail(
            torch.from_numpy(given.astype(np.float32)), self._no_tokens, step, lag=self.rule.lag, **self._state
        )  # fmt: skip
        self.scores.append(self._state["scores_log"].numpy()[step - 1])

    def standing(self) -> tuple[Array, Array]:
        """:func:`tails.standing` after :meth:`step`."""
        log, params = self._state["scores_log"], self._state["params"]
        front, after = tails.standing(log, self._state["survival"], len(self.widths), self.rule.lag, params)
        return front.numpy(), after.numpy()

    def reach(self) -> Array:
        """:func:`tails.reach` after the last :meth:`step`."""
        log, widths, lengths = (self._state[name] for name in ("scores_log", "widths", "lengths"))
        found: Array = tails.reach(log, widths, lengths, self.rule.lag, self._state["params"]).double().numpy()
        return found

    def end(self, ended: Mask) -> None:
        """Requests whose draft ended with the candidate just drawn (a stop token)."""
        self.running &= ~ended

    def _open(self) -> None:
        """Buffers for the tail, some of them this round's own arrays."""
        num_reqs, most = len(self.limits), self.rule.max_length
        num_tokens = len(self.rule.costs.verify.table()) - 1
        params = CostAwareParams.allocate(num_reqs, most, num_tokens, BUCKETS, "cpu")
        self.load(params)
        self._no_tokens = torch.zeros(num_reqs, dtype=torch.int64)
        self._state = {
            name: torch.from_numpy(getattr(self, name)) for name in ("survival", "expected", "lengths", "running")
        } | {
            "params": params, "stop_token_ids": torch.zeros(num_reqs, 0, dtype=torch.int64),
            "draft_tokens": torch.zeros(num_reqs, most, dtype=torch.int64), "any_running": torch.zeros(1),
            "scores_log": torch.zeros(most, num_reqs), "widths": torch.zeros(most, dtype=torch.int32),
        }  # fmt: skip
