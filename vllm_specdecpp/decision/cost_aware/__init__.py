# SPDX-License-Identifier: Apache-2.0
"""Stop by measured cost: the rule, its cost model, its calibration and its guard. Not wired into the engine yet.

``benchmarks.simulate`` runs it against any acceptance process and any costs.
"""

from __future__ import annotations

from vllm_specdecpp.decision.cost_aware.costs import CostCache, CostModel
from vllm_specdecpp.decision.cost_aware.rule import CostAwareRule

__all__ = ["CostAwareRule", "CostCache", "CostModel"]
