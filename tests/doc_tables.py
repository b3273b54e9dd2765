# SPDX-License-Identifier: Apache-2.0
"""What the docs hold of the code's tables, made anew: tests compare.

``python -m tests.doc_tables > docs/grafana.json`` writes the dashboard.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from vllm_specdecpp.config import SpecDecPPConfig
from vllm_specdecpp.engine.metrics import COUNTERS, GAUGES, PANELS, PREFIX, Panel, exposed
from vllm_specdecpp.rule_registry import RULES


def options() -> str:
    """The options as a Markdown table, from the schema, for ``docs/options.md``."""
    rows = ["| option | default | what it does |", "|---|---|---|"]
    for name, field in SpecDecPPConfig.model_fields.items():
        default = "required" if field.is_required() else "" if field.default is None else f"`{field.default}`"
        text = " ".join((field.description or "").split())
        if name == "threshold":
            default = ", ".join(f"{e.threshold:g} ({e.name})" for e in RULES.values() if e.threshold is not None)
        rows.append(f"| `{name}` | {default} | {text} |")
    return "\n".join(rows)


def rules() -> str:
    """The rules as a Markdown table, from the registry, for ``docs/rules.md``."""
    rows = ["| rule | head | `threshold` | when drafting ends |", "|---|---|---|---|"]
    for entry in RULES.values():
        head = "needed" if entry.needs_head else "if given" if entry.reads_head else ""
        threshold = "" if entry.threshold is None else f"{entry.threshold:g}"
        rows.append(f"| `{entry.name}` | {head} | {threshold} | {entry.ends} |")
    return "\n".join(rows)


def metrics() -> str:
    """The metrics as a Markdown table, for ``docs/serving.md``."""
    rows = [(f"{name}_total", [label] if label else [], text) for name, (label, text) in COUNTERS.items()]
    rows += [(name, list(labels), text) for name, (labels, text) in GAUGES.items()]
    lines = ["| `vllm:specdecpp_` | labels | |", "|---|---|---|"]
    lines += [f"| `{name}` | {', '.join(f'`{label}`' for label in labels)} | {text} |" for name, labels, text in rows]
    return "\n".join(lines) + "\n"


def dashboard() -> str:
    """A Grafana dashboard, as JSON."""

    def query(panel: Panel, name: str) -> str:
        def chosen(name: str, only: Mapping[str, str]) -> str:
            match = ", ".join(['model_name=~"$model"', *(f'{label}="{value}"' for label, value in only.items())])
            text = f"{exposed(name)}{{{match}}}"
            if name in GAUGES:
                return text
            return f"sum by ({', '.join(panel.by) or 'engine'}) (rate({text}[$__rate_interval]))"

        return chosen(name, panel.only) + (f" / {chosen(panel.over, {})}" if panel.over else "")

    made = [
        {
            "id": number + 1, "type": "timeseries", "title": panel.title,
            "gridPos": {"h": 8, "w": 8, "x": number % 3 * 8, "y": number // 3 * 8},
            "datasource": {"type": "prometheus", "uid": "$source"},
            "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
            "targets": [
                {"expr": query(panel, name),
                 "legendFormat": " ".join(f"{{{{{label}}}}}" for label in panel.by) or legend or "__auto",
                 "refId": chr(65 + i)}
                for i, (legend, name) in enumerate(panel.of.items())
            ],
        }
        for number, panel in enumerate(PANELS)
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


if __name__ == "__main__":
    print(dashboard(), end="")
