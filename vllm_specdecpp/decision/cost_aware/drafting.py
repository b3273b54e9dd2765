# SPDX-License-Identifier: Apache-2.0
"""One drafting phase under the cost-aware rule: who submits candidate k, and who draws candidate k + 1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_specdecpp.decision.cost_aware.logistic import Array, logit, logit_one
from vllm_specdecpp.decision.cost_aware.plan import Mask, best_extension, best_submission, entries, extends

_HORIZON = 6
"""Candidates looked ahead: as many as a step of the verification's cost is wide on the machines measured."""


@dataclass(frozen=True)
class Decision:
    """About candidate k, which nobody has drawn yet."""

    submit: Mask
    """[num_reqs] requests that draw and submit candidate k."""

    go_on: Mask
    """[num_reqs] those of them that will draw candidate k + 1 too."""


class CostAwareRound:
    """One drafting phase.

    Attributes:
        running: [num_reqs] requests that draw another candidate.
        lengths: [num_reqs] candidates submitted.
        survival: [num_reqs] estimated probability that all scored candidates are accepted.
        expected: [num_reqs] estimated number of accepted candidates.
        widths: requests in each draft pass so far.
        limits: [num_reqs] the most candidates in this round.
        caps: [num_reqs] the same, but for what a probe or the guard cut off.
    """

    def __init__(
        self, rule: Any, request_ids: list[str], limits: NDArray[np.int64], drafts: Mask, rate: float,
        held: bool, probe: bool,
    ) -> None:  # fmt: skip
        self.rule, self.request_ids, self.limits = rule, request_ids, limits
        self.caps = limits
        self.drafts, self.rate, self.held, self.probe = drafts, rate, held, probe
        self.admitted: Any = None
        self.trial = False
        self.running = drafts.copy()
        self.lengths = np.zeros(len(request_ids), dtype=np.int64)
        self.survival = np.ones(len(request_ids))
        self.expected = np.zeros(len(request_ids))
        self.widths: list[int] = []
        self.scores: list[Array] = []  # per step: [num_reqs] log-odds as given, NaN: none

    def leave_out(self, requests: Mask) -> None:
        """Draft nothing for these [num_reqs] after all; only before the first :meth:`step`."""
        self.running &= ~requests
        self.drafts = self.drafts & ~requests

    def step(self, scores: Array | None) -> Decision:
        """Decide about candidate k and k + 1 of every running request, before candidate k is drawn.

        Args:
            scores: [num_reqs] in [0, 1], read where running: acceptance of candidate k (lag 0) or k - 1 (lag 1); NaN or
                None: no score.
        """
        position = len(self.widths) + 1
        index = np.flatnonzero(self.running)
        width = len(index)
        self.widths.append(width)
        x = np.full(len(self.running), np.nan)
        self.scores.append(x)
        scored = scores is not None and position > self.rule.lag
        submit, go_on = self.running.copy(), np.zeros_like(self.running)
        if width == 1:
            i = int(index[0])
            x[i] = log_odds = logit_one(float(scores[i])) if scored and scores is not None else math.nan
            submit[i], go_on[i] = self._decide_one(i, log_odds, position)
        elif width:
            if scored:
                x[index] = logit(np.asarray(scores, dtype=np.float64)[index])
            submit[index], go_on[index] = self._decide(index, x[index], position)
        self.lengths = self.lengths + submit
        self.running = go_on
        return Decision(submit, go_on)

    def _decide(self, index: NDArray[np.int64], x: Array, position: int) -> tuple[Mask, Mask]:
        """[n] submit and go on, of the requests ``index`` [n] with these log-odds [n]."""
        rule = self.rule
        room = self.limits[index] - self.lengths[index] - 1
        reach = self.survival[index]
        # One more than the horizon for a lagged score, which says nothing of candidate k itself.
        following = rule.acceptance.following(x, position - rule.lag, _HORIZON + rule.lag)
        if position > rule.lag:
            reach = reach * rule.acceptance.accept(x, position - rule.lag)
            self.survival[index] = reach
        if rule.lag:
            reach, following = reach * following[:, 0], following[:, 1:]
        if self.held:
            submit, chosen = np.ones(len(index), dtype=np.bool_), room > 0
        else:
            num_tokens = len(self.running) + int(self.lengths.sum())
            verify, step = rule.costs.verify.table(), rule.costs.step.table()
            chosen = best_extension(reach, following, room, self.rate, step, verify, num_tokens + len(index))
            if not chosen.any():
                best = int(np.where(room > 0, reach, -1.0).argmax())
                chosen[best] = room[best] > 0 and self._explores()
            submit, stops = np.ones(len(index), dtype=np.bool_), ~chosen
            if rule.drop_last and stops.any():
                base = num_tokens + int(chosen.sum())
                submit[stops] = best_submission(reach[stops], self.rate, verify, base)
                if self.probe and position == 1 and not submit.any():
                    submit[int(reach.argmax())] = True  # a probe that submits nothing would teach nothing
        self.expected[index] += reach * submit
        return submit, chosen

    def _decide_one(self, i: int, x: float, position: int) -> tuple[bool, bool]:
        """:meth:`_decide` for one request, in floats: most of a small batch's rounds end with few that run."""
        rule, model = self.rule, self.rule.acceptance
        room = int(self.limits[i]) - int(self.lengths[i]) - 1
        reach = float(self.survival[i])
        following = model.walk(x, position - rule.lag, _HORIZON + rule.lag)
        if position > rule.lag:
            reach *= model.accept_one(x, position - rule.lag)
            self.survival[i] = reach
        if rule.lag:
            reach *= following.pop(0)
        submit, go_on = True, room > 0
        if not self.held:
            num_tokens = len(self.running) + int(self.lengths.sum())
            verify = entries(rule.costs.verify.table(), num_tokens, _HORIZON + 2)
            go_on = extends(reach, following, room, self.rate, rule.costs.step.at(1), verify[1:])
            go_on = go_on or (room > 0 and self._explores())
            if not go_on and rule.drop_last and not (self.probe and position == 1):
                submit = reach - self.rate * verify[1] >= -self.rate * verify[0]
        if submit:
            self.expected[i] += reach
        return submit, go_on

    def _explores(self) -> bool:
        """Now and then one request goes on though it does not pay: the calibration would else never see what follows
        low scores. Paid from a fixed share of the time."""
        price = self.rule.costs.step.at(1)
        return False

    def end(self, ended: Mask) -> None:
        """Requests whose draft ended with the candidate just drawn (a stop token)."""
        self.running = self.running & ~ended
