# SPDX-License-Identifier: Apache-2.0
"""What Model Runner V2 does not keep of a request, and the speculator has to know: switch, end, stop tokens.

The Worker shows every scheduler output to :meth:`BatchRequests.update`. Where a request stands is known on the device
only (the host runs ahead of it), so the bounds travel there as numbers: see ``DeviceRound.start``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from vllm_specdecpp.engine.shared.requests import bound_of, is_constrained, stop_tokens_of

NUM_STOP_TOKENS = 32
"""Stop tokens of a request that end its drafts, the end-of-sequence token first. Drafting on past a stop token wastes
passes and changes nothing else, so a longer list may be cut; a fixed width is what a captured graph needs."""

COLUMNS = 2 + NUM_STOP_TOKENS
"""Of :meth:`BatchRequests.table`: the request's cap, its end, then its stop tokens padded with -1."""

_WARM_UP = "_warmup_"
"""What ids of vLLM's warm-up begin with (``vllm.v1.worker.gpu.warmup.warmup_kernels``)."""
_NO_LIMIT = 1 << 30


class BatchRequests:
    """Speculation limits of the requests that the runner holds.

    Args:
        defaults: the server's sampling parameters (``ModelConfig.get_diff_sampling_param``).

    Attributes:
        constrained: requests whose own constraints decide what is accepted (``engine.shared.requests``).
    """

    def __init__(self, defaults: Mapping[str, Any] = MappingProxyType({})) -> None:
        self.constrained: set[str] = set()
        self._defaults = defaults
        self._rows: dict[str, np.ndarray] = {}  # request id -> [COLUMNS] int64
        self._finished: list[str] = []
        self._arrived: set[str] = set()
        self._seeded: set[str] = set()
        self._last: tuple[Any, np.ndarray] | None = None  # arguments and result of :meth:`table`

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._rows

    def update(self, scheduler_output: Any) -> None:
        """Take in new requests and drop finished ones (``vllm.v1.core.sched.output.SchedulerOutput``).

        A preempted request comes back as a new one, under the same id.
        """
        if scheduler_output.finished_req_ids:
            self._last = None
        for request_id in scheduler_output.finished_req_ids:
            self._rows.pop(request_id, None)
            self.constrained.discard(request_id)
            self._seeded.discard(request_id)
            self._finished.append(request_id)
        for request in scheduler_output.scheduled_new_reqs:
            if request.sampling_params is not None:
                self.add(request.req_id, request.prompt_len, request.sampling_params)

    def add(self, request_id: str, prompt_len: int, params: Any) -> None:
        """Remember what ``vllm.SamplingParams`` say; ``prompt_len`` in tokens."""
        row = np.full(COLUMNS, -1, dtype=np.int64)
        # vLLM's warm-up asks for min_p and logit_bias; what it does not draft would be compiled in service.
        row[0] = _NO_LIMIT if request_id.startswith(_WARM_UP) else bound_of(params, _NO_LIMIT)
        row[1] = _NO_LIMIT if params.max_tokens is None else prompt_len + params.max_tokens
        stop_token_ids = stop_tokens_of(params)[:NUM_STOP_TOKENS]
        row[2 : 2 + len(stop_token_ids)] = stop_token_ids
        self._rows[request_id], self._last = row, None
        self._arrived.add(request_id)
        if is_constrained(params, self._defaults):
            self.constrained.add(request_id)
        if params.seed is not None:
            self._seeded.add(request_id)

    def seeded(self, request_ids: Sequence[str]) -> list[int]:
        """Rows of the requests that brought a seed: they draft their likeliest candidates (``engine.v2.sampler``)."""
        return [row for row, request_id in enumerate(request_ids) if request_id in self._seeded]

    def take_arrived(self) -> set[str]:
        """The requests that came, or came back after a preemption, since the last call."""
        arrived, self._arrived = self._arrived, set()
        return arrived

    def take_finished(self) -> list[str]:
        """The requests that ended since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def all_off(self, request_ids: Iterable[str]) -> bool:
        """Whether every one of them switched speculation off: then the draft model has nothing to do for them."""
        return all(request_id in self._rows and self._rows[request_id][0] == 0 for request_id in request_ids)

    def table(self, request_ids: Sequence[str], bound: int, longest: int) -> np.ndarray:
        """One row a request: [num_reqs, COLUMNS] int64; the array of the last call, if nothing has changed since.

        Args:
            request_ids: in the order of the batch; unknown ones (vLLM's dummy runs) have no limits of their own.
            bound: the engine's upper bound on the candidate length in this round.
            longest: how long a sequence may become while it is drafted for, in tokens
                (``draft_limit.longest_drafted``).

        Returns:
            Column 0: the upper bound on the candidate length. Column 1: how long the request's sequence may become,
            or be drafted for.
            The others: its stop tokens, padded with -1.
        """
        asked = [*request_ids], bound, longest
        if self._last is not None and self._last[0] == asked:
            return self._last[1]
        rows = np.full((len(request_ids), COLUMNS), -1, dtype=np.int64)
        rows[:, :2] = _NO_LIMIT
        for index, request_id in enumerate(request_ids):
            if (row := self._rows.get(request_id)) is not None:
                rows[index] = row
        np.minimum(rows[:, 0], bound, out=rows[:, 0])
        np.minimum(rows[:, 1], longest, out=rows[:, 1])
        self._last = asked, rows
        return rows
