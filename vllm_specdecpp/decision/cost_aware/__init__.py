# SPDX-License-Identifier: Apache-2.0
"""Stop by measured cost: who drafts, how far, and what is learnt from it. Plain arrays, no vLLM.

``rule.CostAwareRule`` is what an engine holds: ``begin`` a round (``drafting``), decide in it (``tail``, by
``decision.tails``), ``finish`` it. ``admission`` says who drafts and what a second is worth, ``purse`` what may be
tried besides; ``records`` how often the draft is right for a request, ``acceptance`` and ``logistic`` what a score
means, ``output_lengths`` how long a request will go on. What passes take is in ``vllm_specdecpp.costs``.
``benchmarks.simulate`` runs it against any text and any costs, ``benchmarks.simulate.overhead`` times it.
"""

from __future__ import annotations

from vllm_specdecpp.costs.model import CostModel
from vllm_specdecpp.decision.cost_aware.rule import CostAwareRule

__all__ = ["CostAwareRule", "CostModel"]
