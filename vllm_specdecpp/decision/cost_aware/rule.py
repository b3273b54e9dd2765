# SPDX-License-Identifier: Apache-2.0
"""The cost-aware rule: draft on while the next candidates are worth their time. No threshold, no candidate length.

Renewal-reward: a serving engine emits the most tokens per second, rho, if every second that is spent buys at least rho
tokens. After candidate k of a request another one brings S_k * a_{k+1} tokens, and costs a draft step and a row in the
verification. What this module adds to that comparison:

* horizons: a wider verification may be cheaper, so m = 1, 2, ... more candidates are compared;
* the batch: one draft step serves all requests, so the n best requests are compared for every n;
* the last look: once a pass has shown how likely the candidate about to be drawn is to be accepted, a request that does
  not go on submits it only if it is worth its row;
* K = 0 per request and for the batch (``start``), and a watch over the whole (``guard``).

Lossless: whether candidate j is submitted may depend on anything but Y_j and later ones. Proof. Let F_k
be all that is known once every candidate of rounds past and of this round's steps 1..k-1 is drawn, for all requests,
with the cost model, rho, the calibration and the guard, which change between rounds only. :meth:`CostAwareRound.step`
is called before any candidate of step k is drawn, with scores computed from F_k, so `submit` (whether Y_k is drawn, and
drawn means submitted) and `go_on` are functions of F_k. Y_k given F_k has law q(. | prefix, Y_<k) whatever the others
do, since requests draw independently. Candidate k of request r is submitted iff `go_on` was True at steps 1..k-1, r was
chosen at the start, no candidate before was a stop token, and `submit` is True at step k: an event in F_k. Hence given
that event Y_k still has law q, and rejection sampling turns it into the target's law, token by token. Clock times enter
only through the cost model's state from past rounds. The same holds for greedy drafts, where Y_k is a function of F_k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_specdecpp.decision.cost_aware.costs import CostModel
from vllm_specdecpp.decision.cost_aware.guard import Guard, fixed_tokens
from vllm_specdecpp.decision.cost_aware.online import AcceptanceModel, logit
from vllm_specdecpp.decision.cost_aware.plan import Mask, best_extension, best_submission
from vllm_specdecpp.decision.cost_aware.rate import RateEstimate
from vllm_specdecpp.decision.cost_aware.start import StartGate

Array = NDArray[np.float64]

_HORIZON = 6
"""Candidates looked ahead: as many as a step of the verification's cost is wide on the machines measured."""
_EXPLORE_SHARE = 0.004
"""Of all time, spent on candidates that do not pay, to learn what follows low scores, and on timing K = 0."""


@dataclass(frozen=True)
class Decision:
    """About candidate k, which nobody has drawn yet."""

    submit: Mask
    """[num_reqs] requests that draw and submit candidate k."""

    go_on: Mask
    """[num_reqs] those of them that will draw candidate k + 1 too."""


class CostAwareRule:
    """State of one engine: costs, calibration, rho, guard. Decides for a round through :meth:`begin`.

    Args:
        costs: measured at start-up; :meth:`finish` refreshes it.
        max_length: the most candidates of one request in a round.
        lag: 0: the score given at step k is of candidate k, about to be drawn. 1: of candidate k - 1 (none at step 1).
        acceptance: a calibration to start from.
        drop_last: whether a request may leave out the candidate it just looked at.
        adapt: learn online; False freezes the calibration.
        guarded: whether the guard may take over.
    """

    name = "cost_aware"
    depends_on = (
        "the prefix and Y_1..Y_{k-1} of every request in the batch, through the draft's passes that read them; past "
        "rounds, through the calibration, the costs and rho"
    )

    def __init__(
        self,
        costs: CostModel,
        max_length: int,
        *,
        lag: int = 0,
        acceptance: AcceptanceModel | None = None,
        drop_last: bool = True,
        adapt: bool = True,
        guarded: bool = True,
    ) -> None:
        if max_length < 1:
            raise ValueError(f"specdecpp: num_speculative_tokens={max_length} must be 1 or more")
        self.costs, self.max_length, self.lag = costs, max_length, lag
        self.acceptance = acceptance or AcceptanceModel()
        self.drop_last, self.adapt = drop_last, adapt
        self.rate = RateEstimate()
        self.start = StartGate()
        self.guard = Guard(max_length) if guarded else None
        self.explore_seconds = 0.0  # saved up for candidates that do not pay

    def tokens_per_second(self, num_reqs: int) -> float:
        """rho for a batch of this size; before the first round what a usual acceptance would bring at the best K."""
        off = num_reqs / self.costs.verify.at(num_reqs)
        speedup = self.rate.speedup(num_reqs)
        if speedup is None:
            means = self.acceptance.following(np.array([np.nan]), 0, self.max_length)[0]
            tokens = num_reqs * (1 + np.concatenate([[0.0], np.cumprod(means).cumsum()]))
            speedup = float((tokens / self.costs.fixed_seconds(num_reqs, self.max_length)).max()) / off
        return max(speedup, 1.0) * off

    def begin(self, request_ids: Sequence[str], max_lengths: Sequence[int]) -> CostAwareRound:
        """Start a round: choose who drafts, before the first draft pass.

        Args:
            request_ids: of the requests in the batch.
            max_lengths: upper bounds on the candidate lengths; 0 drafts nothing.
        """
        limits = np.minimum(np.asarray(max_lengths, dtype=np.int64), self.max_length)
        allowed = limits > 0
        rate = self.tokens_per_second(len(limits)) if len(limits) else 0.0
        held = self.guard.tick() if self.guard and allowed.any() else None
        probe = False
        if held is not None:
            limits = np.minimum(limits, held)
            allowed = limits > 0
        elif allowed.any() and self._should_time_off(len(limits)):
            allowed = np.zeros_like(allowed)
        elif allowed.any():
            allowed, probe = self.start.choose(request_ids, allowed, rate, self.costs)
        return CostAwareRound(self, list(request_ids), limits, allowed, rate, held is not None, probe)

    def _should_time_off(self, num_reqs: int) -> bool:
        """Whether to leave drafting out once, since what a round without it takes is not known from real rounds lately:
        everything is compared with it. Paid from the share of the time set apart for exploring."""
        verify = self.costs.verify
        if verify.freshness(num_reqs) >= 1:
            return False
        loss = ((self.rate.speedup(num_reqs) or 1.5) - 1) * verify.at(num_reqs)
        if self.explore_seconds < loss:
            return False
        self.explore_seconds -= loss
        return True

    def finish(
        self,
        round_: CostAwareRound,
        verified: Sequence[int | None],
        accepted: Sequence[int],
        draft_seconds: float | None = None,
        verify_seconds: float | None = None,
    ) -> None:
        """A round has been verified: learn from it.

        Args:
            round_: from :meth:`begin`, its steps done.
            verified: candidates that were verified, at most those submitted; None where the outcome is not known (the
                request ended or was preempted).
            accepted: candidates accepted; anything where ``verified`` is None.
            draft_seconds: real time of the draft phase; None if it was no clean measurement.
            verify_seconds: real time from there to the next draft phase; None, too, if a prefill was in the step.
        """
        num_reqs = len(round_.request_ids)
        if not num_reqs:
            return
        costs = self.costs
        known = np.array([v is not None for v in verified])
        lengths = np.array([v or 0 for v in verified])
        wins = np.where(known, np.minimum(np.asarray(accepted), lengths), 0)  # [num_reqs]
        num_tokens = num_reqs + int(round_.lengths.sum())
        seconds = costs.round_seconds(round_.widths, num_tokens)
        off_seconds = costs.verify.at(num_reqs)
        # An outcome that is not known counts as what was expected of it.
        tokens = np.where(known, wins + 1.0, 1.0 + round_.expected)
        rate = round_.rate
        if round_.widths:
            self._learn(round_, known, lengths, wins, seconds, tokens)
            drafted = known & round_.drafts & (lengths == round_.lengths)
            if not round_.held:
                price = rate * (seconds - off_seconds) / max(1, int(round_.drafts.sum()))
                index = np.flatnonzero(drafted)
                self.start.update(
                    [round_.request_ids[i] for i in index], wins[index].astype(np.float64),
                    lengths[index].astype(np.float64), price, len(round_.widths), round_.probe,
                )  # fmt: skip
        self.rate.update(num_reqs, float(tokens.sum()), seconds, off_seconds)
        self.explore_seconds = min(self.explore_seconds + _EXPLORE_SHARE * seconds, seconds)
        if verify_seconds is not None and draft_seconds is not None:
            costs.observe(round_.widths, draft_seconds, num_tokens, verify_seconds)

    def _learn(
        self, round_: CostAwareRound, known: Mask, lengths: NDArray[np.int64], wins: NDArray[np.int64], seconds: float,
        tokens: Array,
    ) -> None:  # fmt: skip
        """Labels for the calibration, and the guard's comparison."""
        num_reqs, depth = len(known), int(round_.lengths.max(initial=0))
        scores = np.full((depth, num_reqs), np.nan)  # of candidate k in row k - 1
        for k, column in enumerate(round_.scores[self.lag : self.lag + depth]):
            scores[k] = column
        if self.adapt:
            positions = np.arange(1, depth + 1)[:, None]
            seen = known & (positions <= np.minimum(wins + 1, lengths))
            self.acceptance.update(scores, np.where(seen, np.where(positions <= wins, 1.0, 0.0), np.nan))
        if self.guard is None or round_.held or not (known & round_.drafts).all():
            return
        # What would have followed the last verified candidate: from its score, or better from that of the one dropped.
        following = np.empty((num_reqs, self.max_length))
        seen_columns = np.array([*round_.scores[self.lag :], np.full(num_reqs, np.nan)])  # [num_steps, num_reqs]
        for length in np.unique(lengths).tolist():
            rows = np.flatnonzero(lengths == length)
            x = seen_columns[max(length - 1, 0), rows] if length else np.full(len(rows), np.nan)
            following[rows] = self.acceptance.following(x, length, self.max_length)
            dropped = seen_columns[length, rows] if length < len(seen_columns) else np.full(len(rows), np.nan)
            rows, dropped = rows[np.isfinite(dropped)], dropped[np.isfinite(dropped)]
            if len(rows):
                following[rows, 0] = self.acceptance.accept(dropped, length + 1)
                following[rows, 1:] = self.acceptance.following(dropped, length + 1, self.max_length - 1)
        alternatives = fixed_tokens(wins.astype(np.float64), lengths.astype(np.float64), following, self.max_length)
        costs = self.costs.fixed_seconds(num_reqs, self.max_length)
        self.guard.update(float(tokens.sum()), seconds, alternatives, costs)


class CostAwareRound:
    """One drafting phase.

    Attributes:
        running: [num_reqs] requests that draw another candidate.
        lengths: [num_reqs] candidates submitted.
        survival: [num_reqs] estimated probability that all scored candidates are accepted.
        expected: [num_reqs] estimated number of accepted candidates.
        widths: requests in each draft pass so far.
    """

    def __init__(
        self, rule: CostAwareRule, request_ids: list[str], limits: NDArray[np.int64], drafts: Mask, rate: float,
        held: bool, probe: bool,
    ) -> None:  # fmt: skip
        self.rule, self.request_ids, self.limits = rule, request_ids, limits
        self.drafts, self.rate, self.held, self.probe = drafts, rate, held, probe
        self.running = drafts.copy()
        self.lengths = np.zeros(len(request_ids), dtype=np.int64)
        self.survival = np.ones(len(request_ids))
        self.expected = np.zeros(len(request_ids))
        self.widths: list[int] = []
        self.scores: list[Array] = []  # per step: [num_reqs] log-odds as given, NaN: none

    def step(self, scores: Array | None) -> Decision:
        """Decide about candidate k and k + 1 of every running request, before candidate k is drawn.

        Args:
            scores: [num_reqs] in [0, 1], read where running: acceptance of candidate k (lag 0) or k - 1 (lag 1); NaN or
                None: no score.
        """
        rule, running = self.rule, self.running
        position = len(self.widths) + 1
        index = np.flatnonzero(running)
        self.widths.append(len(index))
        x = np.full(len(running), np.nan)
        if scores is not None and position > rule.lag:
            x[index] = logit(np.asarray(scores, dtype=np.float64)[index])
        self.scores.append(x)
        room = self.limits[index] - self.lengths[index] - 1
        # One more than the horizon for a lagged score, which says nothing of candidate k itself.
        following = rule.acceptance.following(x[index], position - rule.lag, _HORIZON + rule.lag)
        if rule.lag:
            if position > 1:
                self._settle(index, rule.acceptance.accept(x[index], position - 1))
            now, following = following[:, 0], following[:, 1:]
            reach = self.survival[index] * now
        else:
            self._settle(index, rule.acceptance.accept(x[index], position))
            reach = self.survival[index]
        submit, go_on = running.copy(), np.zeros_like(running)
        if self.held:
            go_on[index] = room > 0
        else:
            num_tokens = len(running) + int(self.lengths.sum())
            verify, step = rule.costs.verify.table(), rule.costs.step.table()
            chosen = best_extension(reach, following, room, self.rate, step, verify, num_tokens + len(index))
            if not chosen.any():
                chosen = self._explore(reach, room)
            stops = index[~chosen]
            if rule.drop_last and len(stops):
                base = num_tokens + int(chosen.sum())
                submit[stops] = best_submission(reach[~chosen], self.rate, verify, base)
                if self.probe and position == 1 and not submit.any():
                    submit[stops[reach[~chosen].argmax()]] = True  # a probe that submits nothing would teach nothing
            go_on[index[chosen]] = True
        self.lengths = self.lengths + submit
        if rule.lag:
            self.expected[index] += reach * submit[index]
        else:
            self.expected[index] += self.survival[index] * submit[index]
        self.running = go_on
        return Decision(submit, go_on)

    def end(self, ended: Mask) -> None:
        """Requests whose draft ended with the candidate just drawn (a stop token)."""
        self.running = self.running & ~ended

    def _settle(self, index: NDArray[np.int64], accept: Array) -> None:
        self.survival[index] *= accept

    def _explore(self, reach: Array, room: NDArray[np.int64]) -> Mask:
        """Now and then one request goes on though it does not pay: the calibration would else never see what follows
        low scores. Paid from a fixed share of the time."""
        chosen = np.zeros(len(reach), dtype=np.bool_)
        best = int(np.where(room > 0, reach, -1.0).argmax())
        price = self.rule.costs.step.at(1)
        if room[best] > 0 and self.rule.explore_seconds >= price:
            self.rule.explore_seconds -= price
            chosen[best] = True
        return chosen
