# SPDX-License-Identifier: Apache-2.0
"""Metrics beside vLLM's own, in the registry that a server's ``/metrics`` shows, and the plots of them.

The worker counts (``Drafter.take_metrics``). Whoever shows the numbers takes what is new first, so that several API
servers add up; vLLM's counters of candidates and accepted tokens are the sums of ours (:data:`COUNTERS`).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

logger = logging.getLogger("vllm.specdecpp")

PREFIX = "vllm:specdecpp_"

COUNTERS = {
    "rounds": ("candidates", "Verified rounds of one request each, by candidate length."),
    "candidates": ("source", "Candidates verified, by source: vllm:spec_decode_num_draft_tokens, less booked_rows."),
    "accepted": ("source", "Candidates accepted, by source: vllm:spec_decode_num_accepted_tokens."),
    "booked_rows": (None, "Rows of verifications booked beyond what was submitted (asynchronous scheduling)."),
    "stops": ("reason", "Why a round has no more candidates: rule, limit, stop_token, run, not_worth, off."),
    "draft_passes": (None, "Passes of the draft model, each of any number of requests."),
    "draft_passes_saved": (None, "Passes fewer than num_speculative_tokens in each step."),
    "observed_candidates": (None, "Estimated candidates of which the target has said whether they are accepted."),
    "estimated_accepted": (None, "Sum of the estimated acceptance of these candidates."),
    "observed_accepted": (None, "How many of these candidates were accepted."),
    "exploring_seconds": (None, "Seconds of rounds that were not expected to pay."),
    "requests": ("drafts", "Requests that ended: drafted, or at K = 0 and why (min_p, logit_bias, switched_off, ...)."),
}  # fmt: skip
"""Name -> its own label, and what is counted."""

GAUGES = {
    "rho": ((), "Tokens per second expected of the last round; a further candidate must bring more."),
    "expected_speedup": ((), "Tokens per second expected of the last round, over those of not drafting."),
    "cost_seconds": (("what", "tokens"), "Costs in force: of passes (first, step, verify, read) with so many tokens."),
}
"""Name -> its own labels, and what is shown."""


class EngineMetrics:
    """The metrics of the engines behind one front end.

    Args:
        model_name: as it is served.
        engines: vLLM's numbers of them; several with data parallelism.
    """

    def __init__(self, model_name: str, engines: Sequence[int]) -> None:
        import prometheus_client

        for collector in list(prometheus_client.REGISTRY._collector_to_names):  # of an engine before, as vLLM does
            if getattr(collector, "_name", "").startswith(PREFIX):
                prometheus_client.REGISTRY.unregister(collector)
        self._own = [[model_name, str(engine)] for engine in engines]
        common = ["model_name", "engine"]
        self._counters = {
            name: prometheus_client.Counter(PREFIX + name, text, [*common, label] if label else common)
            for name, (label, text) in COUNTERS.items()
        }
        self._gauges = {
            name: prometheus_client.Gauge(PREFIX + name, text, [*common, *labels], multiprocess_mode="mostrecent")
            for name, (labels, text) in GAUGES.items()
        }
        for own in self._own:
            for name, (label, _) in COUNTERS.items():
                if label is None:
                    self._counters[name].labels(*own)  # shows 0
        self._logged: Counter[str] = Counter()  # since the last line
        self._last: dict[str, float] = {}

    def add(self, taken: Sequence[dict[str, Any]]) -> None:
        """Take in what each engine's ``Drafter.take_metrics`` gave."""
        for own, news in zip(self._own, taken, strict=True):
            self._add(own, news)

    def _add(self, own: list[str], taken: dict[str, Any]) -> None:
        for name, label, more in taken["counters"]:
            self._counters[name].labels(*own, *([label] if COUNTERS[name][0] else [])).inc(more)
            self._logged[name] += more
            if (name, label) == ("rounds", "0"):
                self._logged["plain"] += more
        for name, labels, value in taken["gauges"]:
            self._gauges[name].labels(*own, *labels).set(value)
            self._last[name] = value

    def log(self) -> None:
        """One line about the rounds since the last one; none if there were none."""
        new, self._logged = self._logged, Counter()
        if not new["rounds"]:
            return
        line = (
            f"specdecpp: {new['rounds']} rounds, mean candidate length {new['candidates'] / new['rounds']:.2f} "
            f"({new['plain'] / new['rounds']:.0%} at K = 0), {new['draft_passes']} draft passes"
        )
        if new["candidates"]:
            line += f", accepted {new['accepted'] / new['candidates']:.1%}"
        if new["observed_candidates"]:
            of = new["observed_candidates"]
            line += f", acceptance estimated {new['estimated_accepted'] / of:.1%}"
            line += f" and observed {new['observed_accepted'] / of:.1%}"
        if "rho" in self._last:
            line += f", rho {self._last['rho']:.1f} tokens/s, {new['exploring_seconds']:.2f} s exploring"
        logger.info(line)


class Panel(NamedTuple):
    """A plot of the Grafana dashboard and of the page (:mod:`vllm_specdecpp.page`)."""

    title: str
    unit: str
    """Grafana's name of it."""
    of: dict[str, str]
    """Legend -> a gauge, or a counter, whose rate is shown; those that are not ours by their whole name."""
    over: str | None = None
    """Counter by whose rate that is divided."""
    by: tuple[str, ...] = ()
    """Labels of which each value has a line of its own."""
    only: dict[str, str] = {}
    """Labels that what is divided must have."""


PANELS = (
    Panel("Mean candidate length", "short", {"": "candidates"}, "rounds"),
    Panel("Rounds by candidate length", "ops", {"": "rounds"}, by=("candidates",)),
    Panel("Rounds at K = 0", "percentunit", {"": "rounds"}, "rounds", only={"candidates": "0"}),
    Panel("Candidates by source", "ops", {"": "candidates"}, by=("source",)),
    Panel("Acceptance by source", "percentunit", {"": "accepted"}, "candidates", by=("source",)),
    Panel("Acceptance, estimated and observed", "percentunit",
          {"estimated": "estimated_accepted", "observed": "observed_accepted"}, "observed_candidates"),
    Panel("Draft passes", "ops", {"run": "draft_passes", "saved": "draft_passes_saved"}),
    Panel("Why rounds have no more candidates", "ops", {"": "stops"}, by=("reason",)),
    Panel("Requests: drafted, or at K = 0 and why", "ops", {"": "requests"}, by=("drafts",)),
    Panel("Rows booked in vain", "ops", {"": "booked_rows"}),
    Panel("Share of time spent exploring", "percentunit", {"": "exploring_seconds"}),
    Panel("rho, tokens per second", "short", {"": "rho"}),
    Panel("Expected speedup", "short", {"": "expected_speedup"}),
    Panel("Costs in force", "s", {"": "cost_seconds"}, by=("what", "tokens")),
    Panel("vLLM's own count of candidates", "ops", {"": "vllm:spec_decode_num_draft_tokens"}),
)  # fmt: skip


def exposed(name: str) -> str:
    """Of a metric that a panel names: what it is called in ``/metrics``."""
    return (name if ":" in name else PREFIX + name) + ("" if name in GAUGES else "_total")
