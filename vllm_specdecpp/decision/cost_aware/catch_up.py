# SPDX-License-Identifier: Apache-2.0
"""Which requests may have the draft model read what it has not read yet. No vLLM import.

The price of drafting for a request is, first of all, a draft pass over its prompt, or over all that was emitted since
it was drafted for last: on a slow machine many rounds' time. It is paid at once where drafting will save as much over
the tokens that the request is expected to emit; else, as in ski rental, the request first forgoes as much as it costs,
since expectations may be wrong, and even then only while it may emit enough to win that back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vllm_specdecpp.decision.cost_aware.logistic import Mask

PROBE_SHARE = 0.004
"""Of the time without drafting, what probes may spend on reading; the gate allows them as much again for drafting."""
SMALL = 0.5
"""Part of a first pass's time that a round may spend on reading, for all of them, without its being saved up for."""


class CatchUp:
    """Time saved up for reading, by request, and for probes."""

    def __init__(self) -> None:
        self._forgone: dict[str, float] = {}  # request id -> seconds that drafting for it would have gained
        self._pool = 0.0  # seconds that a probe may spend

    def allowed(
        self, request_ids: Sequence[str], wanted: Mask, seconds: Sequence[float],
        remaining: Sequence[float], room: Sequence[int], *, first_seconds: float, off_seconds: float,
        share_seconds: float, speedup: float, probe: bool, pays: Callable[[Mask], bool],
    ) -> Mask:  # fmt: skip
        """Call once a round.

        Args:
            request_ids: of the batch.
            wanted: [num_reqs] requests that the rule would draft for.
            seconds: what each would take to read, beyond a usual first pass.
            remaining: tokens that each is expected to emit yet.
            room: tokens that each may emit at most.
            first_seconds: a first pass.
            off_seconds: a round without drafting.
            share_seconds: a request's share of such a round, in the batches that it will be in.
            speedup: tokens per second with drafting over those without, there.
            probe: whether the round is a probe.
            pays: whether drafting pays for some of ``wanted`` [num_reqs] without the others.

        Returns:
            [num_reqs] those of ``wanted`` that may draft now.
        """
        small = SMALL * first_seconds
        out = wanted.copy()
        if not wanted.any():
            self._pool += PROBE_SHARE * off_seconds
        if probe:
            self._spend(out, seconds, small)
            if not out.any():
                self._pool += PROBE_SHARE * off_seconds
            return out
        gain = max(speedup - 1, PROBE_SHARE) * share_seconds
        per_token = max(1 - 1 / speedup, 0.0) * share_seconds  # seconds saved
        forgone: dict[str, float] = {}
        for index in sorted(np.flatnonzero(wanted).tolist(), key=lambda i: seconds[i]):
            if seconds[index] <= per_token * remaining[index]:
                continue
            if seconds[index] <= small:
                small -= seconds[index]
                continue
            saved = self._forgone.get(request_ids[index], 0.0) + gain
            out[index] = saved >= seconds[index] and per_token * room[index] >= seconds[index]
            if not out[index]:
                forgone[request_ids[index]] = saved
        if out.any() and (out != wanted).any() and not pays(out):
            out[:] = False  # a draft pass for a few takes nearly what it takes for all: they wait for the others
        if wanted.any() and not out.any():
            # Where no request is worth its price, nobody learns whether that has changed: now and then one drafts.
            self._pool += PROBE_SHARE * off_seconds
            cheapest = min(np.flatnonzero(wanted).tolist(), key=lambda i: seconds[i])
            if seconds[cheapest] + first_seconds <= self._pool:
                self._pool -= seconds[cheapest] + first_seconds
                out[cheapest] = True
                forgone.pop(request_ids[cheapest], None)
        # A request that is not wanted this time keeps what it has saved.
        kept = {name: self._forgone[name] for name in request_ids if name in self._forgone and name not in forgone}
        for index in np.flatnonzero(out).tolist():
            kept.pop(request_ids[index], None)
        self._forgone = kept | forgone
        return out

    def _spend(self, out: Mask, seconds: Sequence[float], small: float) -> None:
        """Leave those out of a probe that the pool does not pay for, the cheapest first."""
        for index in sorted(np.flatnonzero(out).tolist(), key=lambda i: seconds[i]):
            if seconds[index] <= small:
                small -= seconds[index]
            else:
                out[index] = seconds[index] <= self._pool
                self._pool -= seconds[index] * out[index]
