# SPDX-License-Identifier: Apache-2.0
"""How many rows of a verification are booked before the device has drafted them (vLLM's adaptive verification).

With asynchronous scheduling the host books rows by the confidences of the drafting before the last one
(``AdaptiveVerificationManager.get_num_tokens``). vLLM's own estimator has one for each of the K positions. Our drafts
end, and behind their end stands 0: a draft of eight that follows one of two would be verified as far as two, and one
that follows a round without drafts not at all. So on the host's copy, and there alone, a request that drafts is
expected to go on as well as it did. One that does not draft books nothing, or, where there are free runs, as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.v1.worker.gpu.spec_decode import adaptive_verification

Array = NDArray[np.float32]


class BookedRows:
    """Stands in front of ``AdaptiveVerificationManager.record_confidences``. The same on all ranks.

    Args:
        manager: of the runner.
        has_runs: whether requests that do not draft may have candidates.
    """

    def __init__(self, manager: Any, has_runs: bool) -> None:
        self._manager, self._has_runs = manager, has_runs
        self._record = manager.record_confidences
        manager.record_confidences = self._record_confidences
        self._last: frozenset[str] = frozenset()  # requests of the last step
        self.drafts: Mapping[int, int] = {}
        """Rows of the batch that draft in this step, and as how many candidates at most."""

    def _record_confidences(self, confidence_probs: torch.Tensor, input_batch: Any) -> None:
        self._record(confidence_probs, input_batch)
        table = self._manager._stale_confidences[self._manager._stale_idx].np  # [max_num_reqs, K], of the last step
        slots, names = input_batch.idx_mapping_np[: input_batch.num_reqs], input_batch.req_ids
        limits = np.zeros(len(slots), dtype=np.int64)
        limits[list(self.drafts)] = list(self.drafts.values())
        known = np.array([name in self._last for name in names])
        table[slots] = expected(np.where(known[:, None], table[slots], 0), limits, self._has_runs)
        self._last, self.drafts = frozenset(names), {}

    @torch.inference_mode()
    def warm(self) -> None:
        """Compile what assigns the rows, of one request and of more: nothing is compiled in service."""
        manager, most = self._manager, self._manager.num_speculative_steps
        for num_reqs in (1, 3 if most == 2 else 2):  # one compiled for as many requests as candidates serves no others
            for budget in (1, 2):
                if num_reqs > len(manager._batch_draft_capacity) or budget >= num_reqs * most:
                    continue  # vLLM does not ask then
                rows = torch.arange(num_reqs, device=manager._batch_draft_capacity.device)
                capacity = manager._batch_draft_capacity[:num_reqs].fill_(most)
                adaptive_verification._assign_draft_token_budget_compiled(
                    manager._confidence_probs, rows, capacity, budget, most
                )


def expected(confidences: Array, limits: NDArray[np.int64], has_runs: bool) -> Array:
    """Confidences of the candidates that are being drafted, none of them known yet.

    Args:
        confidences: [num_reqs, K] of each request's last candidates, 0 behind them.
        limits: [num_reqs] candidates that it drafts at most; 0: it does not.
        has_runs: whether the others may have candidates.
    """
    submitted = confidences > 0
    usual = confidences[submitted].mean() if submitted.any() else 1.0
    own = confidences.sum(axis=1) / np.maximum(submitted.sum(axis=1), 1)
    own = np.where(submitted.any(axis=1), own, usual)[:, None]  # [num_reqs, 1]
    drafted = np.where(submitted, confidences, own) * (np.arange(confidences.shape[1]) < limits[:, None])
    found: Array = np.where(limits[:, None] > 0, drafted, confidences if has_runs else 0)
    return found
