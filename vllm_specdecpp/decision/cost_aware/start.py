# SPDX-License-Identifier: Apache-2.0
"""K = 0: which requests draft at all, decided before the first draft pass, and how they find their way back."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_specdecpp.costs.model import CostModel
from vllm_specdecpp.decision.cost_aware.logistic import Mask

Array = NDArray[np.float64]

_REQUEST_WEIGHT = 16.0
"""Rounds of its own after which a request counts as much as all the others."""
_REQUEST_MEMORY = 32.0
_GLOBAL_MEMORY, _FAST_MEMORY = 384.0, 64.0
"""Requests' rounds that the means remember, and that a faster mean does: once that is three standard errors off, the
workload has changed and the means start from it."""
_SIGMAS, _CHANGED_WEIGHT = 3.0, 16.0
_MARGIN = 0.01
"""Drafting goes on until it loses this share of the tokens per second, and comes back once it gains as much."""
_PROBE_SHARE = 0.004
"""Of all time, at most, that probes may lose."""
_PROBE_MARGIN = 0.1
"""The mean, not one lucky probe, must pay by this much before probes come closer together."""
_PROBE_STEP = 0.15
_LIKELY = 0.6
"""Acceptance that a probe's length is chosen for."""
_MAX_PROBE_LENGTH = 4
_RETURN_WEIGHT = 12.0
"""Requests' rounds that the means count as when drafting comes back."""
_FIRST_INTERVAL, _MAX_INTERVAL = 2.0, 4096.0
_MAX_REQUEST_INTERVAL = 64.0
"""A single request's probe costs little more than its rows."""


@dataclass
class _Request:
    accepted: float = 0.0
    drafted: float = 0.0
    weight: float = 0.0
    skipped: int = 0
    interval: float = _FIRST_INTERVAL
    probed: bool = False


class StartGate:
    """Chooses the requests that draft, from what drafting brought lately (means over rounds that did draft).

    A round's worth is measured with the stop rule in it: accepted candidates against the draft passes and the rows that
    were spent. So a workload whose rounds can mostly be stopped after one cheap look is worth more than its mean
    acceptance says. Each request's mean is shrunk to that of all; what the engine forgets is a request, not a rate.

    Drafting has to beat drafting for none, on the very batch: the price of its time is not rho, which other requests'
    text brought. A stretch that yields less than rho has to be emitted all the same, and by drafting sooner. (Within a
    round rho is the price: there the next candidates change from round to round, not for a whole request.)

    A request that is left out while others draft is probed after 2, 4, 8, ... skipped rounds; if nobody drafts, all are
    probed together, since most of a probe's price is the pass itself, with the candidate length that shows most for its
    price: a calibration that is out of date by then would draft too many. A probe that pays quarters the interval, and
    each round drafted halves it. The longest interval follows from costs: probes may lose 0.4 % of the time.

    Attributes:
        probe_length: candidates of a request in a probe of the whole batch, at most.
        speedup: tokens per second of drafting for the requests that gain most by it, over those of drafting for none;
            as the last :meth:`choose` expected them, whatever it chose.

    Args:
        max_requests: how many requests are remembered; the one seen longest ago is forgotten.
    """

    def __init__(self, max_requests: int = 1024) -> None:
        self.max_requests = max_requests
        self._requests: OrderedDict[str, _Request] = OrderedDict()
        # Before anything was seen: hopeful, so that drafting is tried.
        self._accepted, self._drafted, self._passes = 2.0, 3.0, 3.0
        self._fast, self._variance = self._accepted, 2.0
        self._drafting = True
        self._seen = 4.0  # requests' rounds that the means rest on
        self._skipped, self._interval = 0, _FIRST_INTERVAL  # rounds in which nobody drafted
        self.probe_length = 1
        self.speedup = 1.0

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def drafting(self) -> bool:
        """Whether the last :meth:`choose` found that drafting pays."""
        return self._drafting

    def choose(self, request_ids: Sequence[str], allowed: Mask, rate: float, costs: CostModel) -> tuple[Mask, bool]:
        """Who drafts.

        Args:
            request_ids: of the batch.
            allowed: [num_reqs] requests that may draft.
            rate: tokens per second; sets the price of rows, which says whose drafts are worth more than others'.
            costs: the cost model.

        Returns:
            [num_reqs] bool, and whether the round is a probe only.
        """
        states = [self._get(request_id) for request_id in request_ids]
        verify, num_reqs = costs.verify, len(states)
        off = verify.at(num_reqs)
        slope = rate * max(verify.at(2 * num_reqs) - off, 0.0) / num_reqs
        worth = []  # of the requests that may draft: gain but for the passes, accepted, drafted, index
        for i in np.flatnonzero(allowed).tolist():
            accepted = self._shrunk(states[i].accepted, states[i].weight, self._accepted)
            drafted = self._shrunk(states[i].drafted, states[i].weight, self._drafted)
            worth.append((accepted - slope * drafted, accepted, drafted, i))
        worth.sort(key=lambda entry: -entry[0])
        gained = np.add.accumulate([entry[1] for entry in worth])  # [num_allowed] of the best 1, 2, ... requests
        rows = np.add.accumulate([entry[2] for entry in worth])
        counts = np.arange(1, len(worth) + 1)
        draft = costs.first.many(counts) + max(self._passes - 1, 0.0) * costs.step.many(counts)
        wider = _between(costs, num_reqs + rows)  # [num_allowed]
        # Not at rho: that is of other requests' text, and a stretch that yields less has to be emitted all the same.
        speedups = (1 + gained / num_reqs) * off / (draft + wider)  # [num_allowed]
        top = int(speedups.argmax())
        self.speedup = float(speedups[top])
        best = top + 1 if self.speedup > 1 + (-_MARGIN if self._drafting else _MARGIN) else 0
        order = [entry[3] for entry in worth]
        chosen = np.zeros(num_reqs, dtype=np.bool_)
        chosen[order[:best]] = True
        if best and not self._drafting:
            self._seen = _RETURN_WEIGHT  # what comes now says more than the probes did
        self._drafting = best > 0
        if self._drafting:
            self._skipped = 0
            for index in np.flatnonzero(allowed & ~chosen):
                state = states[index]
                state.skipped += 1
                if state.skipped >= state.interval:
                    chosen[index] = state.probed = True
                    state.skipped = 0
            return chosen, False
        self._skipped += 1
        self.probe_length, price = _cheapest_look(costs, num_reqs)
        longest = price / off / _PROBE_SHARE
        self._interval = min(self._interval, max(longest, _FIRST_INTERVAL))
        if self._skipped < self._interval:
            return chosen, False
        # From the launch, not from the outcome, which may come late or never.
        self._skipped = 0
        return allowed.copy(), True

    def speedup_with(self, request_ids: Sequence[str], drafts: Mask, costs: CostModel) -> float:
        """Tokens per second if just ``drafts`` [num_reqs] drafted, over those of drafting for none."""
        states = [self._get(request_ids[i]) for i in np.flatnonzero(drafts).tolist()]
        if not states:
            return 1.0
        accepted = sum(self._shrunk(state.accepted, state.weight, self._accepted) for state in states)
        rows = sum(self._shrunk(state.drafted, state.weight, self._drafted) for state in states)
        return self._speedup(len(request_ids), len(states), accepted, rows, costs)

    def speedup_of(self, num_reqs: int, costs: CostModel) -> float:
        """Tokens per second of drafting for all of a batch over those of drafting for none, by the means of all."""
        return self._speedup(num_reqs, num_reqs, num_reqs * self._accepted, num_reqs * self._drafted, costs)

    def _speedup(self, num_reqs: int, num_drafts: int, accepted: float, rows: float, costs: CostModel) -> float:
        draft = costs.first.at(num_drafts) + max(self._passes - 1, 0.0) * costs.step.at(num_drafts)
        wider = float(_between(costs, np.array([num_reqs + rows]))[0])
        return (1 + accepted / num_reqs) * costs.verify.at(num_reqs) / (draft + wider)

    def update(
        self,
        request_ids: Sequence[str],
        accepted: Sequence[int],
        drafted: Sequence[int],
        price: float,
        passes: int,
        probe: bool,
    ) -> None:
        """Take in the verified requests that drafted.

        Args:
            request_ids: [n] of those requests.
            accepted: [n] accepted candidates.
            drafted: [n] verified candidates.
            price: accepted candidates that would pay for a request's share of the time that drafting took.
            passes: draft passes of the round.
            probe: whether the round was a probe.
        """
        num = len(accepted)
        if not num:
            return
        # A probe speaks for all the rounds skipped before it.
        self._seen = min(self._seen + num, _GLOBAL_MEMORY)
        step = min(0.25, max(_PROBE_STEP if probe else 0.0, num / self._seen))
        mean = sum(accepted) / num
        self._variance += step * (sum((won - self._accepted) ** 2 for won in accepted) / num - self._variance)
        self._accepted += step * (mean - self._accepted)
        self._drafted += step * (sum(drafted) / num - self._drafted)
        self._passes += (step if probe else min(0.1, step)) * (passes - self._passes)
        self._notice_change(mean, num, max(step, min(0.25, num / _FAST_MEMORY)), probe)
        if probe:
            self._interval = _next_interval(self._interval, self._accepted >= (1 + _PROBE_MARGIN) * price)
        elif self._drafting:
            # Not at once: a return on a lucky probe that ends after a round or two brings no burst of further probes.
            self._interval = max(self._interval / 2, _FIRST_INTERVAL)
        for request_id, won, spent in zip(request_ids, accepted, drafted, strict=True):
            state = self._get(request_id)
            state.weight = min(state.weight + 1, _REQUEST_WEIGHT if probe or state.probed else _REQUEST_MEMORY)
            state.accepted += (won - state.accepted) / state.weight
            state.drafted += (spent - state.drafted) / state.weight
            if state.probed:
                interval = _next_interval(state.interval, won >= price)
                state.probed, state.interval = False, min(interval, _MAX_REQUEST_INTERVAL)

    def _notice_change(self, mean: float, num: int, step: float, probe: bool) -> None:
        self._fast += step * (mean - self._fast)
        error = math.sqrt(max(self._variance, 0.05) * step / (2 - step) / num)
        if probe:
            self._fast = self._accepted
        elif abs(self._fast - self._accepted) > _SIGMAS * error:
            self._accepted, self._seen = self._fast, min(self._seen, _CHANGED_WEIGHT)

    def _get(self, request_id: str) -> _Request:
        state = self._requests.get(request_id)
        if state is None:
            state = self._requests[request_id] = _Request()
            while len(self._requests) > self.max_requests:
                self._requests.popitem(last=False)
        else:
            self._requests.move_to_end(request_id)
        return state

    @staticmethod
    def _shrunk(own: float, weight: float, common: float) -> float:
        return (weight * own + _REQUEST_WEIGHT * common) / (weight + _REQUEST_WEIGHT)


def _next_interval(interval: float, paid: bool) -> float:
    return max(interval / 4, 1.0) if paid else min(interval * 2, _MAX_INTERVAL)


def _between(costs: CostModel, tokens: Array) -> Array:
    """Seconds of verifications of fractional widths."""
    low = tokens.astype(np.int64)
    seconds = costs.verify.many(low)
    return seconds + (tokens - low) * (costs.verify.many(low + 1) - seconds)


def _cheapest_look(costs: CostModel, num_reqs: int) -> tuple[int, float]:
    """The candidate length whose outcome tells most a second, and its seconds beyond those of a round without."""
    prices = costs.fixed_seconds(num_reqs, _MAX_PROBE_LENGTH)
    prices = np.maximum(prices[1:] - prices[0], 1e-3 * prices[0])  # [_MAX_PROBE_LENGTH]
    seen = np.add.accumulate(_LIKELY ** np.arange(_MAX_PROBE_LENGTH))  # candidates with an outcome
    best = int((seen / prices).argmax())
    return best + 1, float(prices[best])
