# SPDX-License-Identifier: Apache-2.0
"""A batch and costs as the cost-aware rule is told of them, for tests that care for little else."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_specdecpp.costs.model import CostModel
from vllm_specdecpp.decision.cost_aware.admission import Standing


def standings(request_ids: Sequence[str], limits: Sequence[int]) -> list[Standing]:
    """Nothing is left to read, and each request has room for a long output, of which it has emitted one token."""
    pairs = zip(request_ids, limits, strict=True)
    return [Standing(name, limit, room=10_000, behind=0, emitted=1) for name, limit in pairs]


def believed(costs: CostModel) -> CostModel:
    """These costs, seen in service so often that a width that costs more than a wider one is no slow moment."""
    for curve in (costs.first, costs.step, costs.verify):
        curve._state[0, 0], curve._table = 1e6, None  # steps at each width; none took longer or shorter
    return costs
