# SPDX-License-Identifier: Apache-2.0
"""The stop rules that there are: one table, which the options, their help, ``docs/rules.md`` and the errors go by.

A new rule is one class with the members of :class:`vllm_specdecpp.decision.rules.StopRule`, and one entry here. The
table imports neither torch nor the rules themselves, so that the options can be read without them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_specdecpp.decision.estimator import Estimator
    from vllm_specdecpp.decision.rules import StopRule
    from vllm_specdecpp.head.model import AcceptanceHead


@dataclass(frozen=True)
class RuleEntry:
    """One stop rule, as the options know it."""

    name: str
    ends: str
    """When drafting ends, for the table in ``docs/rules.md``."""

    make: Callable[[AcceptanceHead | None, float | None], StopRule] | None = None
    """Makes the rule from the loaded head and h; None for ``cost_aware``, which the engine makes with its costs."""

    estimator: Callable[[AcceptanceHead | None], Estimator] | None = None
    """Where its acceptance estimates come from; None if it reads none."""

    threshold: float | None = None
    """Default h; None if it has no threshold."""

    reads_head: bool = False
    needs_head: bool = False

    device_tail: bool = False
    """Whether a kernel decides as it does; Model Runner V2 asks no rule on the host."""


RULES: dict[str, RuleEntry] = {}
"""Every stop rule, by name, the default first: what the options, their help, ``docs/rules.md`` and the errors go by."""


def register(entry: RuleEntry) -> None:
    """Add a stop rule; every process of an engine must do so, so it belongs at the end of this module.

    Raises:
        ValueError: the name is taken.
    """
    if entry.name in RULES:
        raise ValueError(f"specdecpp: there is a rule {entry.name!r} already; choose another name")
    RULES[entry.name] = entry


def one_of_the_rules() -> str:
    """The end of an error's line: which rules there are."""
    return f"must be one of {', '.join(map(repr, RULES))}"


def no_device_tail(name: str) -> str:
    """Why Model Runner V2 cannot run a rule."""
    return f"rule={name!r} has no device tail: it decides on the host, which Model Runner V2 does not wait for"


def _fixed(head: AcceptanceHead | None, threshold: float | None) -> StopRule:
    from vllm_specdecpp.decision.rules import FixedRule

    return FixedRule()


def _top1_or_head(head: AcceptanceHead | None) -> Estimator:
    from vllm_specdecpp.decision.rules import make_estimator

    return make_estimator(head)


def _head(head: AcceptanceHead | None) -> Estimator:
    from vllm_specdecpp.decision.estimator import HeadEstimator

    assert head is not None  # make_rule has asked for it
    return HeadEstimator(head)


def _confidence(head: AcceptanceHead | None) -> Estimator:
    from vllm_specdecpp.decision.estimator import ConfidenceEstimator

    return ConfidenceEstimator()


def _entropy(head: AcceptanceHead | None) -> Estimator:
    from vllm_specdecpp.decision.estimator import EntropyEstimator

    return EntropyEstimator()


def _threshold_rule(
    name: str, ends: str, estimator: Callable[[AcceptanceHead | None], Estimator], default: float, head: bool = False
) -> RuleEntry:
    def make(head: AcceptanceHead | None, threshold: float | None) -> StopRule:
        from vllm_specdecpp.decision.rules import ThresholdRule

        return ThresholdRule(estimator(head), default if threshold is None else threshold, name)

    return RuleEntry(name, ends, make, estimator, default, reads_head=head, needs_head=head, device_tail=True)


_EXCEEDS = "Once 1 - survival exceeds `threshold`; the score is"
for _entry in (
    RuleEntry(
        "cost_aware",
        "The default. Once another candidate is not worth its time, or before the first one (K = 0).",
        estimator=_top1_or_head,
        reads_head=True,
        device_tail=True,
    ),
    RuleEntry("fixed", "Never before `num_speculative_tokens`.", _fixed, device_tail=True),
    # 0.7 with a head is the paper's robust choice; the training-free ones are the best of a replay of 21 training
    # prompts of the Qwen2.5-Coder pair at its CPU step costs (flat from 0.4 to 0.6, and from 0.7 to 0.9); with cheaper
    # draft steps a larger h wins.
    _threshold_rule("threshold", f"{_EXCEEDS} the head's: the paper's rule.", _head, 0.7, head=True),
    _threshold_rule("confidence", f"{_EXCEEDS} the draft's top-1 probability.", _confidence, 0.5),
    _threshold_rule("entropy", f"{_EXCEEDS} exp(-entropy) of the draft's distribution.", _entropy, 0.8),
):
    register(_entry)
