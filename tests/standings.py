# SPDX-License-Identifier: Apache-2.0
"""A batch as the cost-aware rule is told of it, for tests that care for request ids and limits only."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_specdecpp.decision.cost_aware.admission import Standing


def standings(request_ids: Sequence[str], limits: Sequence[int]) -> list[Standing]:
    """Nothing is left to read, and each request has room for a long output, of which it has emitted one token."""
    pairs = zip(request_ids, limits, strict=True)
    return [Standing(name, limit, room=10_000, behind=0, emitted=1) for name, limit in pairs]
