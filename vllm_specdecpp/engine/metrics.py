# SPDX-License-Identifier: Apache-2.0
"""Metrics beside vLLM's own, in the registry that a server's ``/metrics`` shows, and a dashboard of them.

The worker counts (``Drafter.take_metrics``). Whoever shows the numbers takes what is new first, so that several API
servers add up; vLLM's counters of candidates and accepted tokens are the sums of ours (:data:`COUNTERS`).
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

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
    "rho": ((), "Tokens that a second of the last round had to bring."),
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


def dashboard() -> str:
    """A Grafana dashboard, as JSON: ``python -m vllm_specdecpp.engine.metrics > docs/grafana.json``."""

    own = '{model_name=~"$model"}'

    def rate(name: str, by: str = "") -> str:
        total = f"rate({PREFIX}{name}_total{own}[$__rate_interval])"
        return f"sum by ({by or 'engine'}) ({total})"

    panels = [
        ("Mean candidate length", {"": f"{rate('candidates')} / {rate('rounds')}"}, "short"),
        ("Rounds by candidate length", {"{{candidates}}": rate("rounds", "candidates")}, "ops"),
        ("Candidates by source", {"{{source}}": rate("candidates", "source")}, "ops"),
        ("Acceptance by source", {
            "{{source}}": f"{rate('accepted', 'source')} / {rate('candidates', 'source')}"
        }, "percentunit"),
        ("Acceptance, estimated and observed", {
            what: f"{rate(name)} / {rate('observed_candidates')}"
            for what, name in (("estimated", "estimated_accepted"), ("observed", "observed_accepted"))
        }, "percentunit"),
        ("Draft passes", {"run": rate("draft_passes"), "saved": rate("draft_passes_saved")}, "ops"),
        ("Why rounds have no more candidates", {"{{reason}}": rate("stops", "reason")}, "ops"),
        ("Requests: drafted, or at K = 0 and why", {"{{drafts}}": rate("requests", "drafts")}, "ops"),
        ("Rows booked in vain", {"": rate("booked_rows")}, "ops"),
        ("Share of time spent exploring", {"": rate("exploring_seconds")}, "percentunit"),
        ("rho, tokens per second", {"": f"{PREFIX}rho{own}"}, "short"),
        ("Expected speedup", {"": f"{PREFIX}expected_speedup{own}"}, "short"),
        ("Costs in force", {"{{what}} {{tokens}}": f"{PREFIX}cost_seconds{own}"}, "s"),
        ("vLLM's own count of candidates", {
            "": "sum(rate(vllm:spec_decode_num_draft_tokens_total[$__rate_interval]))"
        }, "ops"),
    ]  # fmt: skip
    made = [
        {
            "id": number + 1, "type": "timeseries", "title": title,
            "gridPos": {"h": 8, "w": 8, "x": number % 3 * 8, "y": number // 3 * 8},
            "datasource": {"type": "prometheus", "uid": "$source"},
            "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
            "targets": [
                {"expr": expression, "legendFormat": legend or "__auto", "refId": chr(65 + i)}
                for i, (legend, expression) in enumerate(queries.items())
            ],
        }
        for number, (title, queries, unit) in enumerate(panels)
    ]  # fmt: skip
    variables = [
        {"name": "source", "type": "datasource", "query": "prometheus"},
        {"name": "model", "type": "query", "query": f"label_values({PREFIX}rounds_total, model_name)",
         "datasource": {"type": "prometheus", "uid": "$source"}, "includeAll": True, "multi": True},
    ]  # fmt: skip
    page = {
        "title": "vLLM: speculation with specdecpp", "uid": "specdecpp", "schemaVersion": 39, "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"}, "templating": {"list": variables}, "panels": made,
    }  # fmt: skip
    return json.dumps(page, indent=1) + "\n"


def table() -> str:
    """The metrics, for ``docs/serving.md``."""
    rows = [(f"{name}_total", [label] if label else [], text) for name, (label, text) in COUNTERS.items()]
    rows += [(name, list(labels), text) for name, (labels, text) in GAUGES.items()]
    lines = ["| `vllm:specdecpp_` | labels | |", "|---|---|---|"]
    lines += [f"| `{name}` | {', '.join(f'`{label}`' for label in labels)} | {text} |" for name, labels, text in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(dashboard(), end="")
