# SPDX-License-Identifier: Apache-2.0
"""The cost-aware rule: draft on while the next candidates are worth their time. No threshold, no candidate length.

Renewal-reward: a serving engine emits the most tokens per second, rho, if every second that is spent buys at least rho
tokens. After candidate k of a request another one brings S_k * a_{k+1} tokens, and costs a draft step and a row in the
verification. What this module adds to that comparison:

* horizons: a wider verification may be cheaper, so m = 1, 2, ... more candidates are compared;
* the batch: one draft step serves all requests, so the n best requests are compared for every n;
* the last look: once a pass has shown how likely the candidate about to be drawn is to be accepted, a request that does
  not go on submits it only if it is worth its row (all of this in ``decision.tails``);
* K = 0 per request and for the batch (``start``), and a watch over the whole (``guard``).

Lossless: whether candidate j is submitted may depend on anything but Y_j and later ones. Proof. Let F_k
be all that is known once every candidate of rounds past and of this round's steps 1..k-1 is drawn, for all requests,
with the cost model, the price, the calibration and the guard, which change between rounds only. The scores of step k
are computed from F_k, before any candidate of step k is drawn. `submit` (whether Y_k is submitted) and `go_on` (whether
Y_{k+1} will be drawn, unless Y_k is a stop token) are functions of these scores and of F_k. Y_k given F_k has law
q(. | prefix, Y_<k) whatever the others do, since requests draw independently. Candidate k of request r is submitted iff
`go_on` was True at steps 1..k-1, r was chosen at the start, no candidate before was a stop token, and `submit` is True
at step k: an event in F_k. Hence given that event Y_k still has law q, and rejection sampling turns it into the
target's law, token by token. A draw that is not submitted is forgotten. Clock times enter only through the cost model's
state from past rounds. The same holds for greedy drafts, where Y_k is a function of F_k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vllm_specdecpp.costs.model import CostModel
from vllm_specdecpp.decision.cost_aware.drafting import CostAwareRound, Decision
from vllm_specdecpp.decision.cost_aware.guard import Guard, fixed_tokens
from vllm_specdecpp.decision.cost_aware.logistic import Array, Mask, bucket
from vllm_specdecpp.decision.cost_aware.online import AcceptanceModel
from vllm_specdecpp.decision.cost_aware.rate import RateEstimate
from vllm_specdecpp.decision.cost_aware.start import StartGate

__all__ = ["CostAwareRound", "CostAwareRule", "Decision"]

_EXPLORE_SHARE = 0.003
"""Of all time, spent on timing K = 0."""

_TRIAL_EVERY, _FRESH = 32, 6.0
"""Drafted rounds between two that try out another length, and steps after which a width's time is known."""


class CostAwareRule:
    """State of one engine: costs, calibration, rho, guard. Decides for a round through :meth:`begin`.

    Args:
        costs: measured at start-up; :meth:`finish` refreshes it.
        max_length: the most candidates of one request in a round.
        lag: 0: the score given at step k is of candidate k, about to be drawn. 1: of candidate k - 1 (none at step 1).
        acceptance: a calibration to start from.
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
        adapt: bool = True,
        guarded: bool = True,
    ) -> None:
        if max_length < 1:
            raise ValueError(f"specdecpp: num_speculative_tokens={max_length} must be 1 or more")
        self.costs, self.max_length, self.lag = costs, max_length, lag
        self.acceptance = acceptance or AcceptanceModel()
        self.adapt = adapt
        self.rate = RateEstimate()
        self.start = StartGate()
        self.guard = Guard(max_length) if guarded else None
        self._since_trial = 0
        self.explore_seconds = 0.0  # saved up

    def tokens_per_second(self, num_reqs: int) -> float:
        """rho for a batch of this size; before the first round what a usual acceptance would bring at the best K."""
        off = num_reqs / self.costs.verify.at(num_reqs)
        speedup = self.rate.speedup(num_reqs)
        if speedup is None:
            means = self.acceptance.mean(bucket(np.arange(1, self.max_length + 1)))
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
        caps = limits
        held = self.guard.tick() if self.guard and allowed.any() else None
        probe = False
        if held is not None:
            limits = np.minimum(limits, held)
            allowed = limits > 0
        elif allowed.any() and self._should_time_off(len(limits)):
            allowed = np.zeros_like(allowed)
        elif allowed.any():
            allowed, probe = self.start.choose(request_ids, allowed, rate, self.costs)
            trial = None if probe else self._trial(limits, allowed)
            if probe:
                limits = np.minimum(limits, self.start.probe_length)
            elif trial is not None:
                limits, held, probe = np.minimum(limits, trial), trial, True
        price = 0.0 if probe or held is not None else rate
        round_ = CostAwareRound(self, list(request_ids), limits, allowed, price)
        round_.caps, round_.rate, round_.held, round_.probe = caps, rate, held is not None, probe
        return round_

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

    def _trial(self, limits: NDArray[np.int64], drafts: Mask) -> int | None:
        """Now and then the guard's best fixed length for a round, if its verification was not timed lately.

        The rule settles where its costs are known: a width that was measured too dear at start-up would never be tried.
        """
        rival = self.guard.rival() if self.guard is not None and drafts.any() else None
        if rival is None:
            return None
        self._since_trial += 1
        if self._since_trial < _TRIAL_EVERY:
            return None
        self._since_trial = 0
        num_tokens = len(limits) + int(np.minimum(limits[drafts], rival).sum())
        return rival if self.costs.verify.freshness(num_tokens) < _FRESH else None

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
        known = [v is not None for v in verified]
        submitted = round_.lengths.tolist()
        lengths = [max(0, min(int(v or 0), most)) for v, most in zip(verified, submitted, strict=True)]
        wins = [max(0, min(int(a), v)) if k else 0 for k, v, a in zip(known, lengths, accepted, strict=True)]
        num_tokens = num_reqs + sum(submitted)
        seconds = costs.round_seconds(round_.widths, num_tokens)
        off_seconds = costs.verify.at(num_reqs)
        # An outcome that is not known counts as what was expected of it.
        expected = round_.expected.tolist()
        tokens = num_reqs + sum(won if k else e for k, won, e in zip(known, wins, expected, strict=True))
        if round_.widths:
            drafts = round_.drafts.tolist()
            if self.guard is not None and not round_.probe:
                index = [i for i in range(num_reqs) if known[i] and drafts[i]]
                if 2 * len(index) > sum(drafts):
                    self._compare(self.guard, round_, index, lengths, wins, seconds)
            if self.adapt:
                self._learn(round_, known, lengths, wins)
            if not round_.held:
                price = round_.rate * (seconds - off_seconds) / max(1, sum(drafts))
                index = [i for i in range(num_reqs) if known[i] and drafts[i] and lengths[i] == submitted[i]]
                self.start.update(
                    [round_.request_ids[i] for i in index], [wins[i] for i in index], [lengths[i] for i in index],
                    price, len(round_.widths), round_.probe,
                )  # fmt: skip
        self.rate.update(num_reqs, tokens, seconds, off_seconds)
        self.explore_seconds = min(self.explore_seconds + _EXPLORE_SHARE * seconds, seconds)
        if verify_seconds is not None and draft_seconds is not None:
            costs.observe(round_.widths, draft_seconds, num_tokens, verify_seconds)

    def _learn(self, round_: CostAwareRound, known: list[bool], lengths: list[int], wins: list[int]) -> None:
        """Labels for the calibration: of the accepted candidates and the first rejected one."""
        depth = max(lengths)
        columns = round_.scores[self.lag : self.lag + depth]  # of candidate k at k - 1
        if len(known) == 1:
            x = [float(column[0]) for column in columns] + [math.nan] * (depth - len(columns))
            self.acceptance.update_run(x, wins[0], lengths[0])
            return
        scores = np.full((depth, len(known)), np.nan)
        scores[: len(columns)] = np.reshape(columns, (len(columns), len(known)))
        positions = np.arange(1, depth + 1)[:, None]
        accepted = np.array(wins)
        seen = (positions <= np.minimum(accepted + 1, lengths)) & known
        self.acceptance.update(scores, np.where(seen, np.where(positions <= accepted, 1.0, 0.0), np.nan))

    def _compare(
        self, guard: Guard, round_: CostAwareRound, index: list[int], lengths: list[int], wins: list[int],
        seconds: float,
    ) -> None:  # fmt: skip
        """What fixed lengths would have emitted, for the guard.

        Both sides leave out the tokens of requests that did not draft, or whose outcome is not known; not their rows.
        """
        caps = round_.caps.tolist()
        censored = [at for at, i in enumerate(index) if lengths[i] <= wins[i] and lengths[i] < caps[i]]
        following = self._following(round_, [index[at] for at in censored], lengths)
        won, verified = [wins[i] for i in index], [lengths[i] for i in index]
        limits = [caps[i] for i in index]
        alternatives = fixed_tokens(won, verified, censored, following, limits)
        widths = np.add.reduce(np.array(limits)[:, None] > np.arange(self.max_length), axis=0)  # [max_length]
        costs = self.costs.capped_seconds(len(lengths), widths)
        guard.update(float(sum(won) + len(index)), seconds, alternatives, costs)

    def _following(self, round_: CostAwareRound, index: list[int], lengths: list[int]) -> Array:
        """[n, max_length] acceptance of what would have followed the last verified candidate of each request."""
        columns, model = round_.scores[self.lag :], self.acceptance  # columns: of candidate 1, 2, ...
        num = self.max_length + self.lag
        x, positions = [], []
        for i in index:
            # From the score of the candidate that was dropped, or the last that was scored.
            position = min(lengths[i] + 1, len(columns))
            if position and position > lengths[i] and columns[position - 1][i] != columns[position - 1][i]:
                position -= 1
            x.append(float(columns[position - 1][i]) if position else math.nan)
            positions.append(position)
        walks = model.walk_many(np.array(x), np.array(positions, dtype=np.int64), num).tolist()
        out = np.empty((len(index), self.max_length))
        for row, i in enumerate(index):
            ahead = lengths[i] - positions[row]
            if ahead < 0:
                out[row] = [float(model.accept(np.array(x[row]), positions[row])), *walks[row]][: self.max_length]
            else:
                out[row] = walks[row][ahead : ahead + self.max_length]
        return out
