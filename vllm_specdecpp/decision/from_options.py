# SPDX-License-Identifier: Apache-2.0
"""The stop rule that the options ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_specdecpp.config import SpecDecPPConfig
from vllm_specdecpp.decision.rules import StopRule
from vllm_specdecpp.rule_registry import RULES

if TYPE_CHECKING:  # the head imports this package's features
    from vllm_specdecpp.head.model import AcceptanceHead


def make_rule(config: SpecDecPPConfig, head: AcceptanceHead | None) -> StopRule:
    """The rule that the options ask for; the cost-aware one is made by the engine, with its costs.

    A threshold that they leave out is the head's tuned one, if it has one.

    Raises:
        ValueError: the head's own threshold is not one.
    """
    entry, threshold = RULES[config.resolved_rule], config.resolved_threshold
    assert entry.make is not None
    if entry.needs_head and config.threshold is None and threshold is not None:
        assert head is not None  # the options name one
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
