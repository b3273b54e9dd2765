# SPDX-License-Identifier: Apache-2.0
"""The stop rule that the options ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_specdecpp.config import SpecDecPPConfig
from vllm_specdecpp.decision.rules import StopRule
from vllm_specdecpp.rule_registry import find_rule

if TYPE_CHECKING:  # the head imports this package's features
    from vllm_specdecpp.head.model import AcceptanceHead


def make_rule(config: SpecDecPPConfig, head: AcceptanceHead | None) -> StopRule:
    """The rule that the options ask for; the cost-aware one is made by the engine, with its costs.

    A threshold that they leave out is the head's tuned one, if it has one.

    Raises:
        ValueError: there is no such rule, it needs a head and none is loaded, or the head's own threshold is not one.
    """
    entry, threshold = find_rule(config.resolved_rule), config.resolved_threshold
    if entry.make is None:
        raise ValueError(f"specdecpp: rule={entry.name!r} is not made from options; the engine makes it with its costs")
    if entry.needs_head:
        if head is None:
            raise ValueError(
                f"specdecpp: rule={entry.name!r} needs an acceptance head and none is loaded; give head=..."
            )
        if config.threshold is None and threshold is not None:
            threshold = _tuned_threshold(head, entry.name, threshold)
    return entry.make(head, threshold)


def _tuned_threshold(head: AcceptanceHead, rule: str, default: float) -> float:
    """The ``threshold`` of the rule in the head's config, as ``vllm-specdecpp tune`` writes it, else ``default``."""
    tuned: Any = head.metadata.get("rule")
    if not isinstance(tuned, dict) or tuned.get("rule") != rule:
        return default
    threshold = tuned.get("threshold", default)
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 < threshold < 1:
        raise ValueError(
            f"specdecpp: the head's config.json has rule.threshold={threshold!r}, which must lie strictly between 0 "
            "and 1; tune the head again, or give threshold="
        )
    return float(threshold)
