# SPDX-License-Identifier: Apache-2.0
"""K = 0: which requests draft at all, decided before the first draft pass, and how they find their way back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_specdecpp.decision.cost_aware.costs import CostModel
from vllm_specdecpp.decision.cost_aware.plan import Mask

Array = NDArray[np.float64]

_REQUEST_WEIGHT = 8.0
"""Rounds of its own after which a request counts as much as all the others."""
_REQUEST_MEMORY = 32.0
_GLOBAL_MEMORY = 64.0
_MARGIN = 0.02
"""Drafting goes on until it loses this much of a round, and comes back once it gains as much."""
_PROBE_SHARE = 0.004
"""Of all time, at most, that probes may lose."""
_PROBE_MARGIN = 0.1
"""The mean, not one lucky probe, must pay by this much before probes come closer together."""
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


class StartGate:
    """Chooses the requests that draft, from what drafting brought lately (means over rounds that did draft).

    A round's worth is measured with the stop rule in it: accepted candidates against the draft passes and the rows that
    were spent. So a workload whose rounds can mostly be stopped after one cheap look is worth more than its mean
    acceptance says. Each request's mean is shrunk to that of all; what the engine forgets is a request, not a rate.

    A request that is left out while others draft is probed after 2, 4, 8, ... skipped rounds; if nobody drafts, all are
    probed together, since most of a probe's price is the pass itself. A probe that pays quarters its interval. The
    longest interval follows from costs: probes may lose 0.4 % of the time.

    Args:
        max_requests: how many requests are remembered; the one seen longest ago is forgotten.
    """

    def __init__(self, max_requests: int = 1024) -> None:
        self.max_requests = max_requests
        self._requests: OrderedDict[str, _Request] = OrderedDict()
        # Before anything was seen: hopeful, so that drafting is tried.
        self._accepted, self._drafted, self._passes = 2.0, 3.0, 3.0
        self._drafting = True
        self._seen = 4.0  # requests' rounds that the means rest on
        self._skipped, self._interval = 0, _FIRST_INTERVAL  # rounds in which nobody drafted

    def __len__(self) -> int:
        return len(self._requests)

    def choose(self, request_ids: Sequence[str], allowed: Mask, rate: float, costs: CostModel) -> tuple[Mask, bool]:
        """Who drafts.

        Args:
            request_ids: of the batch.
            allowed: [num_reqs] requests that may draft.
            rate: tokens per second.
            costs: the cost model.

        Returns:
            [num_reqs] bool, and whether the round is a probe only.
        """
        states = [self._get(request_id) for request_id in request_ids]
        accepted = np.array([self._shrunk(s.accepted, s.weight, self._accepted) for s in states])
        drafted = np.array([self._shrunk(s.drafted, s.weight, self._drafted) for s in states])
        verify, num_reqs = costs.verify, len(states)
        slope = (verify.at(2 * num_reqs) - verify.at(num_reqs)) / num_reqs
        order = np.argsort(-np.where(allowed, accepted - rate * max(slope, 0.0) * drafted, -np.inf))
        best, best_gain = 0, 0.0
        gained = rows = 0.0
        margin = (_MARGIN if not self._drafting else -_MARGIN) * rate * verify.at(num_reqs)
        for count in range(1, int(allowed.sum()) + 1):
            index = order[count - 1]
            gained += accepted[index]
            rows += drafted[index]
            price = costs.first.at(count) + max(self._passes - 1, 0.0) * costs.step.at(count)
            price += _between(costs, num_reqs + rows) - verify.at(num_reqs)
            gain = gained - rate * price - margin
            if gain > best_gain:
                best, best_gain = count, gain
        chosen = np.zeros(num_reqs, dtype=np.bool_)
        chosen[order[:best]] = True
        self._drafting = best > 0
        if self._drafting:
            self._skipped = 0
            for index in np.flatnonzero(allowed & ~chosen):
                state = states[index]
                state.skipped += 1
                chosen[index] = state.skipped >= state.interval
            return chosen, False
        self._skipped += 1
        price = costs.draft_seconds([num_reqs] * max(1, round(self._passes))) + _between(costs, num_reqs + rows)
        longest = (price / verify.at(num_reqs) - 1) / _PROBE_SHARE
        self._interval = min(self._interval, max(longest, _FIRST_INTERVAL))
        if self._skipped < self._interval:
            return chosen, False
        return allowed.copy(), True

    def update(
        self, request_ids: Sequence[str], accepted: Array, drafted: Array, price: float, passes: int, probe: bool
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
        if not len(accepted):
            return
        # A probe speaks for all the rounds skipped before it.
        self._seen = min(self._seen + len(accepted), _GLOBAL_MEMORY)
        step = min(0.25, max(0.15 if probe else 0.0, len(accepted) / self._seen))
        self._accepted += step * (float(accepted.mean()) - self._accepted)
        self._drafted += step * (float(drafted.mean()) - self._drafted)
        self._passes += min(0.1, step) * (passes - self._passes)
        if probe:
            self._skipped = 0
            self._interval = _next_interval(self._interval, self._accepted >= (1 + _PROBE_MARGIN) * price)
        elif self._drafting:
            self._interval = _FIRST_INTERVAL
        for request_id, won, spent in zip(request_ids, accepted, drafted, strict=True):
            state = self._get(request_id)
            state.weight = min(state.weight + 1, _REQUEST_WEIGHT if probe or state.skipped else _REQUEST_MEMORY)
            state.accepted += (float(won) - state.accepted) / state.weight
            state.drafted += (float(spent) - state.drafted) / state.weight
            if state.skipped:
                interval = _next_interval(state.interval, bool(won >= price))
                state.skipped, state.interval = 0, min(interval, _MAX_REQUEST_INTERVAL)

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


def _between(costs: CostModel, tokens: float) -> float:
    low = int(tokens)
    return costs.verify.at(low) + (tokens - low) * (costs.verify.at(low + 1) - costs.verify.at(low))
