# SPDX-License-Identifier: Apache-2.0
"""Which of the runs that sources propose are taken, and how far: they cost rows in the verification alone."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vllm_specdecpp.costs.model import CostModel
from vllm_specdecpp.decision.cost_aware.logistic import Array, Mask, OnlineLogistic, bucket, sigmoid
from vllm_specdecpp.decision.sources import Run, RunSource
from vllm_specdecpp.decision.sources.suffix import x_of

Counts = NDArray[np.int64]

_MEMORY = 500.0
"""Observed candidates after which an old one counts 1/e: texts that repeat themselves come and go."""
_OWN, _OWN_MEMORY = 2.0, 30.0
"""Accepted candidates of a request that weigh as much as all others' do, and how many observed ones it remembers."""
WORTH = 0.75
"""Of an expected token, where rows are weighed: of rows that seem just worth it most are overestimated, and text that
does not repeat itself would pay for them."""
_MAX_REQUESTS = 1024
"""That are remembered; the one seen longest ago is forgotten."""


@dataclass
class Taken:
    """The runs of a round: of requests that do not draft, and, once the drafts are there, behind these."""

    runs: list[Run | None]
    """[num_reqs]"""
    lengths: Counts
    """[num_reqs] candidates taken."""
    accepted: Array
    """[num_reqs] how many of them are expected to be accepted."""

    def without(self, drafts: Mask) -> Taken:
        """Requests that draft take no run."""
        runs = [None if leaves else run for run, leaves in zip(self.runs, drafts.tolist(), strict=True)]
        return Taken(runs, np.where(drafts, 0, self.lengths), np.where(drafts, 0.0, self.accepted))

    def joined(self, others: Taken, where: Mask) -> Taken:
        """With the runs of ``others`` in the rows of ``where`` [num_reqs]."""
        runs = [his if takes else mine for mine, his, takes in zip(self.runs, others.runs, where.tolist(), strict=True)]
        accepted = np.where(where, others.accepted, self.accepted)
        return Taken(runs, np.where(where, others.lengths, self.lengths), accepted)

    def token_ids(self, index: int) -> list[int]:
        """The candidates of a request."""
        run = self.runs[index]
        return [] if run is None else run.token_ids[: self.lengths[index]]


class Before(NamedTuple):
    """What is submitted in front of the runs."""

    rows: int
    """Tokens that are verified in any case."""
    tokens: float
    """That are emitted then, as expected."""
    seconds: float
    """Spent on drafting."""
    survival: Array
    """[num_reqs] chance that all candidates in front of a request's run are accepted."""


class FreeRuns:
    """Takes of each request's runs the one that promises most, and of all these the rows that pay.

    Rows are taken in the order of their chance to be accepted, over the whole batch, as long as tokens per second rise:

        (num_reqs + WORTH * sum of the n best chances) / verify(num_reqs + n)

    A candidate's chance is that of all before it too, so what is taken of a run begins at its start. Behind drafts
    (:class:`Before`) what they have cost and are expected to bring counts as well.

    The same match means more in code than in chat: a request's own runs shift its log-odds by the logarithm of accepted
    over expected.

    Args:
        sources: whose runs they are.
    """

    def __init__(self, sources: Sequence[RunSource] = ()) -> None:
        self.models = {source.name: OnlineLogistic(*source.start, memory=_MEMORY) for source in sources}
        self._own: OrderedDict[str, tuple[float, float]] = OrderedDict()  # request -> expected, accepted
        self.candidates, self.accepted = dict.fromkeys(self.models, 0), dict.fromkeys(self.models, 0)
        self._promised: dict[str, tuple[int, float]] = {}  # request id -> rows and accepted ones of the last report

    @property
    def theta(self) -> Array | None:
        """[2 + num_buckets] what a device estimates chances by: it has one source."""
        return next((model.theta for model in self.models.values()), None)

    def take(
        self, request_ids: Sequence[str], runs: Sequence[Sequence[Run]], limits: Counts, costs: CostModel,
        before: Before | None = None,
    ) -> Taken:  # fmt: skip
        """Choose for a round.

        Args:
            request_ids: of the batch.
            runs: [num_reqs] what the sources propose for each request; empty: nothing for anybody.
            limits: [num_reqs] candidates at most.
            costs: the cost model.
            before: None: nothing but the last emitted token of each request.
        """
        num_reqs = len(limits)
        before = before or Before(num_reqs, float(num_reqs), 0.0, np.ones(num_reqs))
        taken = Taken([None] * num_reqs, np.zeros(num_reqs, dtype=np.int64), np.zeros(num_reqs))
        reaches: list[NDArray[Any]] = []
        owners: list[int] = []
        for index, (proposed, limit) in enumerate(zip(runs, limits.tolist(), strict=bool(runs))):
            best, best_sum = None, 0.0
            for run in proposed:
                reach = before.survival[index] * np.cumprod(self.chances(run, request_ids[index])[:limit])
                if float(reach.sum()) > best_sum:
                    best, best_sum, taken.runs[index] = reach, float(reach.sum()), run
            if best is not None:
                reaches.append(best)
                owners += [index] * len(best)
        if not reaches:
            return taken
        chance, owner = np.concatenate(reaches), np.array(owners)
        order = np.argsort(-chance, kind="stable")
        tokens = before.tokens + WORTH * np.concatenate([[0.0], np.add.accumulate(chance[order])])
        rows = np.arange(before.rows, before.rows + len(order) + 1)
        best_rows = order[: int((tokens / (before.seconds + costs.verify.many(rows))).argmax())]
        taken.lengths += np.bincount(owner[best_rows], minlength=num_reqs)
        taken.accepted += np.bincount(owner[best_rows], weights=chance[best_rows], minlength=num_reqs)
        return taken

    def promised(self, request_ids: Sequence[str], limits: Counts) -> Taken:
        """What is expected of runs that only a device will see: as much as of the last ones that were reported.

        Args:
            request_ids: of the batch.
            limits: [num_reqs] candidates at most.
        """
        last = [self._promised.get(name, (0, 0.0)) for name in request_ids]
        lengths = np.minimum([rows for rows, _ in last], limits)
        return Taken([None] * len(last), lengths, np.minimum([accepted for _, accepted in last], lengths))

    def reported(self, request_ids: Sequence[str], matches: Counts, lengths: Counts, accepted: Array) -> Taken:
        """:meth:`of_device`, of requests that draft what they leave: the next rounds' :meth:`promised`."""
        self._promised = dict(zip(request_ids, zip(lengths.tolist(), accepted.tolist(), strict=True), strict=True))
        return self.of_device(matches, lengths, accepted)

    def of_device(self, matches: Counts, lengths: Counts, accepted: Array) -> Taken:
        """The runs that a device took (:func:`.device_runs.take_runs`), without their tokens.

        Args:
            matches: [num_reqs] tokens that match.
            lengths, accepted: [num_reqs] as in :class:`Taken`.
        """
        rows = zip(matches.tolist(), lengths.tolist(), strict=True)
        name = next(iter(self.models))
        runs = [Run(name, [], x_of(match, max(length, 1))) if match else None for match, length in rows]
        return Taken(runs, lengths, accepted)

    def chances(self, run: Run, request_id: str = "") -> Array:
        """[length] that each candidate is accepted if all before it are; without ``request_id`` of any request."""
        log_odds = self.models[run.source].log_odds(run.x, bucket(np.arange(1, len(run.x) + 1)))
        return sigmoid(log_odds + self.shift(request_id))

    def gain(self, run: Run, request_id: str, accept: float) -> float:
        """Tokens more that are expected of a run if the draft model had drawn its first candidate.

        Args:
            run: of some source.
            request_id: whose it is.
            accept: chance of a candidate that the draft model draws; below the run's own the gain is negative.
        """
        chances = self.chances(run, request_id)
        return (accept - float(chances[0])) * (1 + float(np.cumprod(chances[1:]).sum()))

    def shift(self, request_id: str) -> float:
        """What a request's own runs add to the log-odds of its candidates."""
        expected, accepted = self._own.get(request_id, (0.0, 0.0))
        return math.log((accepted + _OWN) / (expected + _OWN))

    def learn(
        self, request_ids: Sequence[str], taken: Taken, verified: Sequence[int | None], accepted: Sequence[int],
        adapt: Sequence[bool] = (),
    ) -> None:  # fmt: skip
        """A round has been verified; arguments as in :meth:`.CostAwareRule.finish`.

        ``adapt``: [num_reqs] whether the request teaches of others too; empty: all do.
        """
        left, observed_of = set(), set()  # sources
        for name, run, length, seen, won, teaches in zip(
            request_ids, taken.runs, taken.lengths.tolist(), verified, accepted, adapt or [True] * len(request_ids),
            strict=True,
        ):  # fmt: skip
            if run is None or seen is None:
                continue
            expected, own = self._own.get(name, (0.0, 0.0))
            if not length:  # not worth its rows: it is to be tried again some day
                left |= {run.source} if teaches else set()
                keep = math.exp(-1 / _MEMORY)
                self._remember(name, keep * expected, keep * own)
                continue
            if not seen:  # a grammar cut it, or there was no room: that tells of this request alone
                self._remember(name, expected + float(self.chances(run)[0]), own)
                continue
            num_seen, num_won = min(length, seen), min(length, seen, max(won, 0))
            self.candidates[run.source] += num_seen
            self.accepted[run.source] += num_won
            observed = min(num_won + 1, num_seen)  # the accepted ones and the first rejected one
            keep = math.exp(-observed / _OWN_MEMORY)
            self._remember(name, keep * expected + float(self.chances(run)[:observed].sum()), keep * own + num_won)
            if teaches:
                observed_of.add(run.source)
                labels = (np.arange(observed) < num_won).astype(np.float64)
                self.models[run.source].update(run.x[:observed], bucket(np.arange(1, observed + 1)), labels)
        for source in left - observed_of:  # once a round, however many requests there are
            self.models[source].rest()

    def _remember(self, request_id: str, expected: float, accepted: float) -> None:
        self._own.pop(request_id, None)
        self._own[request_id] = expected, accepted
        if len(self._own) > _MAX_REQUESTS:
            self._own.popitem(last=False)

    def state(self) -> dict[str, Any]:
        """What was learnt, as JSON."""
        return {name: model.state() for name, model in self.models.items()}

    def restore(self, state: dict[str, Any], weight: float = 1.0) -> None:
        """Take up :meth:`state`; a source that it does not know begins anew."""
        for name, model in self.models.items():
            if name in state:
                model.restore(state[name], weight)
