# SPDX-License-Identifier: Apache-2.0
"""The cost-aware rule: draft on while the next candidates are worth their time. No threshold, no candidate length.

Renewal-reward: a serving engine emits the most tokens per second, rho, if every second that is spent buys at least rho
tokens. After candidate k of a request another one brings S_k * a_{k+1} tokens, and costs a draft step and a row in the
verification. What this module adds to that comparison:

* horizons: a wider verification may be cheaper, so m = 1, 2, ... more candidates are compared;
* the batch: one draft step serves all requests, so the n best requests are compared for every n;
* the last look: once a pass has shown how likely the candidate about to be drawn is to be accepted, a request that does
  not go on submits it only if it is worth its row;
* K = 0 per request and for the batch (``admission``), which also says what rho is, and what is tried beyond it
  (``purse``);
* free runs (``free_runs``): instead of a draft, and behind one, which may end for it (``CostAwareRound.outrun``).

Lossless: whether candidate j is submitted may depend on anything but Y_j and later ones. Proof. Let F_k be all that is
known once every candidate of rounds past and of this round's steps 1..k-1 is drawn, for all requests, with costs, rho,
calibration and who is admitted, which change between rounds only. Step k's tail (:func:`.tails.cost_aware_tail`) reads
the scores, which are computed from F_k, its state and the round's parameters. The token that it is given it only
records, and compares with the stop tokens. So `submit` (whether Y_k is submitted) and `go_on` are functions of F_k, but
for a stop token, which ends the draft behind Y_k. Y_k given F_k has law q(. | prefix, Y_<k) whatever the others do, as
requests draw independently, and by fresh noise in each round (on V2 the speculator sees to it). Candidate k of request
r is submitted iff `go_on` was True at steps 1..k-1, r was chosen at the start, no candidate before was a stop token,
and `submit` is True at step k: an event in F_k. A draft that ends for a run ends behind Y_k, which is submitted, by
what is known once Y_k is drawn; the run's tokens are functions of the past and of Y_1..Y_k, with a one-hot q. Hence
given that event Y_k still has law q, and rejection sampling turns it into the target's law, token by token. Clock times
enter through the cost model's state from past rounds, and through what a search took before the first draw. The same
holds for greedy drafts, where Y_k is a function of F_k.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Mapping, Sequence
from operator import and_
from typing import Any

import numpy as np

from vllm_specdecpp.costs.model import CostModel
from vllm_specdecpp.decision.cost_aware.acceptance import AcceptanceModel
from vllm_specdecpp.decision.cost_aware.admission import Admission, Admitted, Standing
from vllm_specdecpp.decision.cost_aware.drafting import CostAwareRound
from vllm_specdecpp.decision.cost_aware.free_runs import FreeRuns
from vllm_specdecpp.decision.cost_aware.purse import Purse
from vllm_specdecpp.decision.sources import Run, RunSource

__all__ = ["CostAwareRound", "CostAwareRule", "Standing"]

_MOST_IN_FLIGHT = 64
"""Rounds that a device may be behind the host; one begun longer ago is over."""
_HALF_LIFE = 86400.0
"""Seconds after which what an earlier start has learnt counts half."""


class CostAwareRule:
    """State of one engine: costs, calibration, admission, purse. Decides for a round through :meth:`begin`.

    Args:
        costs: measured at start-up; :meth:`finish` refreshes it.
        max_length: the most candidates of one request in a round.
        lag: 0: the score given at step k is of candidate k, about to be drawn. 1: of candidate k - 1 (none at step 1).
        acceptance: a calibration to start from.
        adapt: learn online; False freezes the calibration.
        scores: whose scores these are; what was learnt of others' is not taken up.
        sources: that propose runs, beside the draft model.
        drafts: whether there is a draft model.
    """

    name = "cost_aware"
    depends_on = (
        "the prefix and Y_1..Y_{k-1} of every request in the batch, through the draft's passes that read them; past "
        "rounds, through the calibration, the costs and who is admitted"
    )

    def __init__(
        self,
        costs: CostModel,
        max_length: int,
        *,
        lag: int = 0,
        acceptance: AcceptanceModel | None = None,
        adapt: bool = True,
        scores: str = "",
        sources: Sequence[RunSource] = (),
        drafts: bool = True,
    ) -> None:
        if max_length < 1:
            raise ValueError(f"specdecpp: num_speculative_tokens={max_length} must be 1 or more")
        self.costs, self.max_length, self.lag = costs, max_length, lag
        self.acceptance = acceptance or AcceptanceModel()
        self.apart = copy.deepcopy(self.acceptance)  # of rounds in which only constrained requests draft
        self.adapt, self.scores = adapt, scores
        self.admission = Admission()
        self.purse = Purse()
        self._in_flight: deque[Admitted] = deque(maxlen=_MOST_IN_FLIGHT)  # rounds that were begun
        self.explored_seconds = 0.0  # in rounds that were trials
        self.sources, self.drafts = tuple(sources), drafts
        self.free_runs = FreeRuns(self.sources)

    def begin(self, batch: Sequence[Standing], runs: Sequence[Sequence[Run]] | None = ()) -> CostAwareRound:
        """Start a round: choose who drafts, before the first draft pass, and who takes a run.

        Args:
            batch: its requests.
            runs: [num_reqs] what the sources propose for each; empty: nothing for anybody. None: a device looks for
                them later (``device_runs``), and what the last ones promised stands for them here.
        """
        limits = np.array([min(s.limit, self.max_length) for s in batch], dtype=np.int64)
        if not batch:
            return CostAwareRound(self, [], limits, limits > 0, 0.0)
        self.purse.open(len(batch), self.costs.verify.at(len(batch)))
        names = [s.request_id for s in batch]
        free = None
        if runs is None:
            free = self.free_runs.promised(names, limits)
        elif self.sources:
            free = self.free_runs.take(names, runs, limits, self.costs)
        may_draft = batch if self.drafts else [s._replace(limit=0) for s in batch]
        admitted = self.admission.plan(may_draft, self.costs, self.purse, free)
        self._in_flight.append(admitted)
        taken = None if runs is None or free is None else free.without(admitted.drafts)
        constrained = np.array([s.constrained for s in batch])
        return CostAwareRound(self, names, limits, admitted.drafts, admitted.price, admitted, taken, constrained)

    def finish(
        self,
        round_: CostAwareRound,
        verified: Sequence[int | None],
        accepted: Sequence[int],
        draft_seconds: float | None = None,
        verify_seconds: float | None = None,
        read: Sequence[int] = (),
    ) -> None:
        """A round has been verified: learn from it.

        Args:
            round_: from :meth:`begin`, its steps done.
            verified: candidates that were verified, at most those submitted; None where the outcome is not known (the
                request ended or was preempted).
            accepted: candidates accepted; anything where ``verified`` is None.
            draft_seconds: real time of the draft phase; None if it is not known.
            verify_seconds: real time from there to the next draft phase; None, too, if a prefill was in the step.
            read: tokens of each draft pass that read more than the usual two of a request; they are part of that phase.
        """
        num_reqs = len(round_.request_ids)
        if not num_reqs:
            return
        costs = self.costs
        submitted, drafts = round_.submitted.tolist(), round_.drafts.tolist()
        drafted_by = round_.lengths.tolist()  # candidates; a free run may go on behind them
        known = [v is not None and v >= 0 for v in verified]
        lengths = [min(v or 0, n) if there else 0 for v, n, there in zip(verified, drafted_by, known, strict=True)]
        wins = [min(max(won, 0), n) if there else 0 for won, n, there in zip(accepted, lengths, known, strict=True)]
        num_tokens = num_reqs + sum(submitted)
        seconds = costs.round_seconds(round_.widths, num_tokens)
        off_seconds = costs.verify.at(num_reqs)
        # An outcome that is not known counts as what was expected of it, and so does every run: drafting is judged.
        base = num_reqs + float(round_.free.accepted.sum())
        drafted = sum(wins)
        tokens = base + drafted
        if not all(known):
            tokens += sum(n for n, there in zip(round_.expected.tolist(), known, strict=True) if not there)
        admitted = round_.admitted
        assert admitted is not None
        self.purse.earn(seconds + admitted.reading)
        constrained = round_.constrained.tolist()
        lost = 0.0
        if admitted.trial and round_.widths:  # here an outcome that is not known counts as none
            lost = seconds + admitted.reading - (base + drafted) / admitted.baseline
        while any(admitted is begun for begun in self._in_flight):  # those before it will not finish any more
            begun = self._in_flight.popleft()
            self.purse.settle(lost if begun is admitted else 0.0, begun.staked)
        if round_.widths:
            self.explored_seconds += seconds * admitted.trial
            if round_.alone or not any(map(and_, drafts, constrained)):
                self.admission.learn(admitted, tokens, seconds, off_seconds, round_.alone)
            self._record(round_, known, lengths, wins)
            if self.adapt:
                self._learn(round_, known, lengths, wins)
        adapt = [self.adapt and not apart for apart in constrained]
        # Of a run behind a draft the outcome is known if the whole draft was accepted.
        behind = [
            None if v is None or min(v, won) < n else v - n
            for v, won, n in zip(verified, accepted, drafted_by, strict=True)
        ]
        of_runs = [won - n for won, n in zip(accepted, drafted_by, strict=True)]
        self.free_runs.learn(round_.request_ids, round_.free, behind, of_runs, adapt)
        self.admission.lengths.brought(round_.request_ids, of_runs)
        self.admission.records.served()
        if draft_seconds is not None:
            costs.observe_draft(round_.widths, draft_seconds, read)
        if verify_seconds is not None:
            costs.verify.observe(num_tokens, verify_seconds)
        for curve in (costs.first, costs.step, costs.verify):
            curve.table()  # while a device drafts, not when the next round waits for it

    def _record(
        self, round_: CostAwareRound, known: Sequence[bool], lengths: Sequence[int], wins: Sequence[int]
    ) -> None:  # fmt: skip
        """How often the draft was right, of the candidates that were looked at."""
        rows = zip(
            round_.request_ids, round_.drafts.tolist(), round_.lengths.tolist(), known, lengths, wins,
            round_.constrained.tolist(), strict=True,
        )  # fmt: skip
        found = []
        for row, (name, drafts, submitted, is_known, length, won, constrained) in enumerate(rows):
            if not drafts:
                continue
            num, right = min(won + 1, length) if is_known else 0, float(won)
            # The one that was looked at and dropped counts as estimated.
            if (not is_known or won == submitted) and submitted < len(round_.looks):
                x = round_.looks[submitted][row]
                if x == x:
                    num, right = num + 1, right + round_.estimates[submitted][row]
            found.append((name, num, right, constrained))
        if found:
            self.admission.records.update(*zip(*found, strict=True))

    def _learn(
        self, round_: CostAwareRound, known: Sequence[bool], lengths: Sequence[int], wins: Sequence[int]
    ) -> None:  # fmt: skip
        """Labels for the calibration: of the accepted candidates and the first rejected one, of requests that teach."""
        if len(known) == 1:
            depth = lengths[0] if known[0] and round_.drafts[0] else 0
            x = [column[0] for column in round_.looks[:depth]]
            x += [math.nan] * (depth - len(x))
            round_.acceptance.update_run(x, wins[0], depth, float(round_.levels[0]))
            return
        teaches = np.array(known) if round_.alone else np.array(known) & ~round_.constrained
        drafted, won = np.where(round_.drafts, lengths, 0), np.array(wins)
        depth = int(drafted.max()) if teaches.any() else 0
        columns = round_.scores[self.lag : self.lag + depth]  # of candidate k at k - 1
        scores = np.full((depth, len(teaches)), np.nan)
        scores[: len(columns)] = np.reshape(columns, (len(columns), len(teaches)))
        positions = np.arange(1, depth + 1)[:, None]
        seen = (positions <= np.minimum(won + 1, drafted)) & teaches
        labels = np.where(seen, np.where(positions <= won, 1.0, 0.0), np.nan)
        round_.acceptance.update(scores, labels, round_.levels)

    def state(self) -> dict[str, Any]:
        """What was learnt, as JSON: for the next start of the same pair."""
        return {
            "scores": self.scores,
            "admission": self.admission.state(),
            "acceptance": self.acceptance.state(),
            "runs": self.free_runs.state(),
        }

    def restore(self, state: Mapping[str, Any], age_seconds: float = 0.0) -> bool:
        """Take up :meth:`state` of an earlier start, as far as its age lets it count.

        Returns:
            Whether it was taken up: not if it is of other scores, or damaged.
        """
        if state.get("scores") != self.scores:
            return False
        weight = 0.5 ** (age_seconds / _HALF_LIFE)
        admission, acceptance, free_runs = Admission(), AcceptanceModel(), FreeRuns(self.sources)
        try:
            admission.restore(state["admission"], weight)
            acceptance.restore(state["acceptance"], weight)
            free_runs.restore(state.get("runs", {}), weight)
        except (KeyError, TypeError, ValueError):
            return False
        self.admission, self.acceptance, self.free_runs = admission, acceptance, free_runs
        self.apart = copy.deepcopy(acceptance)
        return True
