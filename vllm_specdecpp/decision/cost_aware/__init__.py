# SPDX-License-Identifier: Apache-2.0
"""Stop by measured cost: who drafts, how far, and what is learnt from it. Plain arrays, no vLLM.

``rule.CostAwareRule`` is what an engine holds: ``begin`` a round (``drafting``), decide in it (``tail``, by
``decision.tails``), ``finish`` it. ``costs`` and ``curves`` say what a round takes, ``online`` and ``logistic`` what is
accepted, ``rate`` what a second is worth, ``start`` who drafts at all, ``guard`` whether a fixed candidate length would
do better. ``benchmarks.simulate`` runs it against any acceptance process and any costs, ``benchmarks.overhead`` times
it.
"""

from __future__ import annotations

from vllm_specdecpp.costs.model import CostModel
from vllm_specdecpp.decision.cost_aware.rule import CostAwareRule

__all__ = ["CostAwareRule", "CostModel"]
