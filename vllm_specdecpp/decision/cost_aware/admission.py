# SPDX-License-Identifier: Apache-2.0
"""Who drafts at all: one formula for a set of requests, decided before the first draft pass of a round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vllm_specdecpp.costs.model import CostModel
from vllm_specdecpp.decision.cost_aware.free_runs import Taken
from vllm_specdecpp.decision.cost_aware.logistic import logit, logit_one
from vllm_specdecpp.decision.cost_aware.output_lengths import OutputLengths
from vllm_specdecpp.decision.cost_aware.purse import Purse
from vllm_specdecpp.decision.cost_aware.records import EASY, Array, Records

Mask = NDArray[np.bool_]

_LENGTHS = np.array([1, 2, 3, 4, 6, 8, 12, 16, 20, 28])
"""Candidate lengths that are compared."""
_ENOUGH = 12.0
"""Looks before which nothing is expected, only hoped."""
_SLOW_START = 0.3
"""Share of a draft pass's time that is hoped to have been a slow moment of start-up, before real passes were seen."""
_BATCH_MEMORY = 128.0
"""Rounds that the usual batch size remembers."""
_SHARE = 4.0
"""A request's record tells as much of the next candidate as so many times the last score: 3.8 and 4.7 where it was
fitted (recorded rounds at temperature 0, the record shrunk by 6 and by 12 looks), and more of later candidates."""
_MOST_READING = 4.0
"""Times of a round without drafting that are spent on reading before another request is put off to the next round."""
_FIT_MEMORY = 64.0
"""Rounds that the correction remembers."""


class Standing(NamedTuple):
    """Where a request of the batch stands, before a round."""

    request_id: str
    limit: int
    """Candidates that it may draft at most in this round; 0: none."""
    room: int
    """Tokens that it may emit at most after its next token."""
    behind: int
    """Tokens that the draft model would have to read beyond the two of a usual first pass."""
    emitted: int
    """Tokens that it has emitted."""
    apart: float = 0.0
    """Seconds that reading costs beside what a longer first pass does: its share of a pass of its own (V2)."""
    constrained: bool = False
    """Constraints of its own decide what is accepted: its outcomes tell of no other request."""


@dataclass
class Admitted:
    """Who drafts in a round, and what a second of it must bring."""

    drafts: Mask
    """[num_reqs]"""
    price: float
    """Tokens per second."""
    baseline: float
    """Tokens per second without the trial, if the round is one; else as expected."""
    expected: float = 0.0
    """Tokens per second that the formula says of a round that is no trial, before it is corrected; 0: not known."""
    trial: bool = False
    """Whether some request drafts that is not expected to gain by it."""
    staked: float = 0.0
    """Seconds that it has taken from the purse already; a device tells of the round only after the next one began."""
    levels: Array | None = None
    """[num_reqs] what each request's record adds to a score's log-odds as to the candidates after it; None: 0."""
    reading: float = 0.0
    """Seconds that the draft model spends on reading what it is behind."""


class Admission:
    """Chooses the requests that draft.

    For the n requests whose drafts bring most, and K candidates each, a round emits

        tokens(n, K) = num_reqs + sum of a + a^2 + ... + a^K        a: the request's acceptance (Records)
        seconds(n, K) = first(n) + (K - 1) step(n) + verify(num_reqs + n K) + reading

    where reading is what the draft model has yet to read of the n requests, spread over the tokens that they are
    expected to emit: at least as many as they have emitted, so a request that goes on is read in time (ski rental).
    Where there are free runs, over those that no run brings: as many as no run has brought so far. The
    best n and K are compared with a round without drafting. The stop rule does better than the best K, or the text is
    not that even: how much faster drafted rounds were than the formula says is expected of the next ones.

    What is not expected to pay is tried where it would pay if the requests were easy, while the purse pays for what the
    trial will lose. Before anything is known, everything is a trial.

    A request that does not draft may have a free run (``free_runs``), which drafting would replace: its tokens and rows
    count in "without drafting".

    A request that has to be read is judged in the batch that is usual, if that is larger: others are about to join.

    Attributes:
        price: rho, tokens that a second of drafting had to bring in the last round that was planned.
        speedup: tokens per second as expected of that round, over those of drafting for none.
    """

    def __init__(self) -> None:
        self.records = Records()
        self.lengths = OutputLengths()
        self.price, self.speedup = 0.0, 1.0
        self._mean_reqs, self._weight = 0.0, 0.0
        # Faded sums over drafted rounds, in rounds without drafting; as much at the start as all the memory holds.
        # [others, constrained requests]
        self._fit_seconds, self._fit_expected = np.full(2, _FIT_MEMORY), np.full(2, _FIT_MEMORY)

    @property
    def correction(self) -> float:
        """Tokens per second of drafted rounds over those that the formula said."""
        return self._correction(False)

    def _correction(self, constrained: bool) -> float:
        return float(self._fit_expected[int(constrained)] / self._fit_seconds[int(constrained)])

    def plan(
        self, batch: Sequence[Standing], costs: CostModel, purse: Purse, free: Taken | None = None
    ) -> Admitted:  # fmt: skip
        """Decide for a round; ``free``: what is submitted of requests that do not draft."""
        num_reqs = len(batch)
        base_rows, base_tokens = num_reqs, float(num_reqs)
        if free is not None:
            base_rows, base_tokens = num_reqs + int(free.lengths.sum()), num_reqs + float(free.accepted.sum())
        self._weight = min(self._weight + 1, _BATCH_MEMORY)
        self._mean_reqs += (num_reqs - self._mean_reqs) / self._weight
        self.lengths.update({s.request_id: s.emitted for s in batch})
        off_rate = base_tokens / costs.verify.at(base_rows)
        levels = np.zeros(num_reqs)
        out = Admitted(np.zeros(num_reqs, dtype=np.bool_), off_rate, off_rate, levels=levels)
        index = np.flatnonzero([s.limit > 0 for s in batch])
        if not len(index):
            self.price, self.speedup = off_rate, off_rate * costs.verify.at(num_reqs) / num_reqs
            return out
        mine = [batch[i] for i in index.tolist()]
        apart = [s.constrained for s in mine]
        mean, hoped = self.records.of([s.request_id for s in mine], apart)
        alone = all(apart)
        correction = self._correction(alone)
        levels[index] = _SHARE * (logit(mean) - logit_one(self.records.usual(alone)))
        limits = np.array([s.limit for s in mine])
        # That drafting for a request replaces:
        rows, tokens = (0 * limits, 0 * mean) if free is None else (free.lengths[index], free.accepted[index])
        debts, charges = np.zeros(len(mine)), np.zeros(len(mine))
        for i, s in enumerate(mine):
            if s.behind > 0:
                debts[i] = costs.extra_seconds(s.behind) + s.apart
                charges[i] = debts[i] / max(self.lengths.remaining(s.request_id, s.room, free is not None), 1.0)
        reads = bool(charges.any())

        def best(accept: Array, pace: float = 1.0) -> tuple[float, NDArray[np.int64], int]:
            usual = round(self._mean_reqs)
            among: NDArray[np.int64] | slice = slice(None)
            if usual > num_reqs and reads:
                fill = usual - num_reqs
                padded = np.concatenate([accept, np.full(fill, accept.mean())])
                far = np.concatenate([limits, np.full(fill, int(limits.max()))])
                charged = np.concatenate([charges, np.zeros(fill)])
                speed, chosen, _ = _best(costs, usual, usual, padded, far, charged, 0 * far, 0 * padded, pace)
                pays = correction * speed * costs.verify.at(usual) > usual
                worth = set(chosen.tolist()) if pays else set()
                kept = [i for i in range(len(mine)) if not debts[i] or i in worth]
                among = np.array(kept, dtype=np.int64)
                if not len(among):
                    return 0.0, among, 0
            speed, chosen, length = _best(
                costs, base_rows, base_tokens, accept[among], limits[among], charges[among], rows[among], tokens[among],
                pace,
            )  # fmt: skip
            return correction * speed, chosen if isinstance(among, slice) else among[chosen], length

        rate, chosen, hopes = 0.0, index[:0], True
        if self.records.known_of(alone) >= _ENOUGH:
            rate, chosen, _ = best(mean)
            hopes = bool((hoped > mean).any())
        else:  # nothing says that any of them is not easy
            hoped = np.maximum(hoped, EASY)
        self.speedup = max(rate / off_rate, 1.0)
        if rate > off_rate:
            out.drafts[index[chosen]] = True
            out.expected, out.price, out.baseline = rate / correction, rate, rate
        rate_hoped, length, new = 0.0, 0, chosen[:0]
        tried = new
        if hopes and (not out.expected or len(chosen) < len(mine)):
            others = np.ones(len(mine), dtype=np.bool_)
            others[chosen] = not out.expected
            seen = min(curve.freshness(len(mine)) for curve in (costs.first, costs.step))
            rate_hoped, hopeful, length = best(hoped, 1 - _SLOW_START / (1 + seen))
            new = hopeful[others[hopeful]]
        if len(new) and rate_hoped > out.price:
            new = new[np.lexsort((new, debts[new]))]
            while len(new) and not out.trial:
                everyone = np.concatenate([chosen, new]) if out.expected else new
                # As expected, not as hoped, the stop rule ends a draft about where its first rejection is.
                accepted = _geometric(mean[everyone], np.minimum(limits[everyone], length))
                passes = 1 + float(accepted.max())
                more_rows = len(everyone) + float(accepted.sum()) - int(rows[everyone].sum())
                seconds = costs.first.at(len(everyone)) + (passes - 1) * costs.step.at(len(everyone))
                seconds += costs.verify.at(base_rows + round(more_rows)) + float(debts[new].sum())
                lost = seconds - (base_tokens + float((accepted - tokens[everyone]).sum())) / out.price
                out.trial = purse.affords(lost)
                if out.trial:
                    out.staked, tried = purse.stake(lost), new
                    out.drafts[index[everyone]] = True
                    if not out.expected:  # the stop rule hopes as well
                        out.price *= float((mean[new] / hoped[new]).mean())
                new = new[: len(new) // 2]  # half of them cost less
        self.price = out.price
        if reads:
            # In the batch's order, so that everybody's turn comes: one waits if those before it take too long.
            drafting = np.flatnonzero(out.drafts[index])
            before = debts[drafting].cumsum() - debts[drafting]
            late = drafting[(debts[drafting] > 0) & (before > _MOST_READING * costs.verify.at(num_reqs))]
            if len(late):
                out.drafts[index[late]] = False
                out.expected, out.baseline = 0.0, off_rate  # the formula has said nothing of those that are left
                out.trial &= bool(out.drafts[index[tried]].any())
            out.reading = float(debts[out.drafts[index]].sum())
        return out

    def learn(
        self, admitted: Admitted, tokens: float, seconds: float, off_seconds: float, constrained: bool = False
    ) -> None:  # fmt: skip
        """Take in a drafted round: ``tokens`` emitted in ``seconds``, reading left out; if ``constrained``, of such."""
        if admitted.expected and not admitted.trial:
            for fit, more in ((self._fit_seconds, seconds), (self._fit_expected, tokens / admitted.expected)):
                fit[int(constrained)] = (1 - 1 / _FIT_MEMORY) * fit[int(constrained)] + more / off_seconds

    def state(self) -> dict[str, Any]:
        """What the next start of the same pair may take up."""
        return {
            "records": self.records.state(),
            "lengths": self.lengths.state(),
            "fit": [float(self._fit_seconds[0]), float(self._fit_expected[0])],
        }

    def restore(self, state: dict[str, Any], weight: float = 1.0) -> None:
        """Take up :meth:`state`; ``weight`` in [0, 1] says how much it still counts.

        Raises:
            ValueError: it is none.
        """
        self.records.restore(state["records"], weight)
        self.lengths.restore(state["lengths"])
        fit = [float(x) for x in state["fit"]]
        if not (len(fit) == 2 and min(fit) > 0 and max(fit) < 1e9):
            raise ValueError(f"specdecpp: a fit of {fit} is none")
        self._fit_seconds[0], self._fit_expected[0] = fit


def _geometric(accept: Array, length: NDArray[np.int64]) -> Array:
    """Expected accepted candidates: a + a^2 + ... + a^length."""
    accepted: Array = accept * (1 - np.power(accept, length)) / (1 - accept)
    return accepted


def _best(
    costs: CostModel, base_rows: int, base_tokens: float, accept: Array, limits: NDArray[np.int64], charges: Array,
    free_rows: NDArray[np.int64], free_tokens: Array, pace: float = 1.0,
) -> tuple[float, NDArray[np.int64], int]:  # fmt: skip
    """The most tokens per second of drafting for some of n requests, which, and their candidate length.

    Args:
        costs: the cost model.
        base_rows: tokens that are verified if nobody drafts.
        base_tokens: tokens that are emitted then, as expected.
        accept: [n] acceptance.
        limits: [n] candidates at most.
        charges: [n] seconds of reading for each token that the request emits.
        free_rows, free_tokens: [n] what of the two is a free run's, which drafting replaces.
        pace: what draft passes take of their time.
    """
    lengths = _LENGTHS[: int(_LENGTHS.searchsorted(limits.max())) + 1]
    longest = np.minimum(lengths, limits[:, None])  # [n, num_lengths]
    gains = _geometric(accept[:, None], longest)  # [n, num_lengths]
    reading = charges[:, None] * (1 + gains)
    gains = gains - free_tokens[:, None]
    value = reading[:, -1] * base_tokens / costs.verify.at(base_rows) - gains[:, -1]
    order, num = value.argsort(kind="stable"), 1 + len(accept)
    tokens = base_tokens + gains[order].cumsum(axis=0)
    seconds = reading[order].cumsum(axis=0)
    seconds += costs.verify.many(base_rows + (longest - free_rows[:, None])[order].cumsum(axis=0))
    seconds += pace * (costs.first.upto(num)[1:, None] + costs.step.upto(num)[1:, None] * (lengths - 1))
    speeds = tokens / seconds
    count, column = divmod(int(speeds.argmax()), len(lengths))
    return float(speeds[count, column]), order[: count + 1], int(lengths[column])
