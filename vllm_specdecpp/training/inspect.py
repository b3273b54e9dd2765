# SPDX-License-Identifier: Apache-2.0
"""Say what a head, a dataset or a costs file is: for which models, made how, and what it holds.

Example: vllm-specdecpp inspect heads/mine
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from vllm_specdecpp.training.options import POSITIONAL, CommandOptions

MANIFEST_FILE = "manifest.json"
CALIBRATION_ROWS = Path("calibration") / "rows.jsonl"
"""Where ``calibrate`` puts its figures, unless it is told otherwise."""
_SHOWN_ESTIMATORS = ("head", "head_uncalibrated", "confidence")
_SHOWN_OF_A_LIST = 8
_INDENT = 32
COSTS = "costs that an engine measured"


class InspectOptions(CommandOptions):
    """Say what a head, a dataset or a costs file is."""

    what: str = Field(min_length=1, json_schema_extra=POSITIONAL)
    """Head (a folder or a hub id), dataset folder, or costs file: engines keep them in VLLM_CACHE_ROOT/specdecpp (by
    default ~/.cache/vllm/specdecpp)."""

    plot: Path | None = None
    """PNG to draw the curves of a costs file into."""

    as_json: bool = Field(default=False, alias="json")
    """Print one JSON object, with everything that is known."""


def run(options: InspectOptions) -> int:
    """Print what ``options.what`` is.

    Raises:
        ValueError: one line: nothing is there, or it is none of the three, or damaged.
    """
    found = facts(options.what)
    if options.plot is not None:
        _plot(found, options.plot)
    print(json.dumps(found, indent=2) if options.as_json else as_text(found))
    return 0


def facts(what: str) -> dict[str, Any]:
    """Everything known about a head, a dataset or a costs file: ``"kind"``, then sections of JSON values.

    Raises:
        ValueError: one line: nothing is there, or it is none of the three, or damaged.
    """
    path = Path(what).expanduser()
    if path.is_file():
        return _costs(path)
    if (path / MANIFEST_FILE).is_file():
        return _dataset(path)
    if (architectures := _architectures(path)) is not None:
        raise ValueError(
            f"specdecpp: {what} is a model ({architectures}), and neither a head, a dataset nor a costs file; "
            "name a head's folder, or train one: docs/head.md"
        )
    return _head(what)


def _architectures(folder: Path) -> str | None:
    """What a Hugging Face model's configuration calls it; None for anything else."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures")
    except (OSError, ValueError, AttributeError):
        return None
    return ", ".join(map(str, found)) if isinstance(found, list) and found else None


def _plot(found: Mapping[str, Any], path: Path) -> None:
    from vllm_specdecpp.training.plots import plot_costs

    if found["kind"] != COSTS:
        raise ValueError(f"specdecpp: plot={path}: only costs are drawn, not this ({found['kind']}); leave it out")
    if path.exists():
        raise ValueError(f"specdecpp: plot={path} exists; name another file, or remove it")
    setting = found["setting"]
    curves = {name: {int(w): s for w, s in curve.items()} for name, curve in found["seconds"].items()}
    plot_costs(curves, path, f"{setting['draft']} drafting for {setting['target']}, {setting['device']}")


def as_text(found: Mapping[str, Any]) -> str:
    """The facts as one screen of text: a line a fact, long lists shortened."""
    lines = []
    for section, content in found.items():
        if not isinstance(content, Mapping):
            lines.append(f"{section:{_INDENT}}{_shown(content)}")
            continue
        if content:
            lines += ["", section]
        lines += [f"  {name:{_INDENT - 2}}{_shown(value)}" for name, value in content.items()]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items()) or "-"
    if isinstance(value, (list, tuple)):
        shown = [_shown(item) for item in value[:_SHOWN_OF_A_LIST]]
        more = [f"... ({len(value)} in all)"] if len(value) > _SHOWN_OF_A_LIST else []
        return ", ".join(shown + more) or "none"
    return "unknown" if value is None else str(value)


def _head(source: str) -> dict[str, Any]:
    from vllm_specdecpp.head import files as head_files
    from vllm_specdecpp.head.model import AcceptanceHead

    head = AcceptanceHead.from_pretrained(source)
    folder = head_files.find(source, None)
    known = dict(head.metadata)
    pair = {name: known.pop(name, None) for name in ("target", "draft")}
    rule = known.pop("rule", None)
    return {
        "kind": "acceptance head",
        "where": source,
        "architecture": {
            "hidden size": head.hidden_size,
            "blocks": f"{head.num_layers}, {'tied' if head.tied else 'untied'}",
            **({"projected to": head.width} if head.width else {}),
            "reads": "the pass that read the candidate (lag 1)" if head.lag else "the pass before the draw (lag 0)",
            "features": list(head.features),
            "standardized": head.standardize,
            "parameters": head.num_parameters,
        },
        "pair": pair,
        "training": _training(folder, known),
        "calibration": head.calibration
        or {"state": f"none: its score is no probability; vllm-specdecpp calibrate {shlex.quote(source)} ... fits one"},
        "on held-out prompts": _figures(folder),
        "rule": rule or {"state": f"the engine's default; vllm-specdecpp tune {shlex.quote(source)} ... chooses one"},
        "serve": _serve_commands(pair, source, rule),
    }


def _training(folder: Path, known: dict[str, Any]) -> dict[str, Any]:
    """What the config's other keys and ``provenance.json`` say."""
    from vllm_specdecpp.training.fit.held_out import PROVENANCE_FILE

    path = folder / PROVENANCE_FILE
    if not path.is_file():
        return known or {"state": "unknown: no provenance.json beside the weights"}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        data = {
            entry["folder"]: {key: entry["manifest"].get(key) for key in ("source", "num_prompts", "created")}
            for entry in content.get("data", [])
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"specdecpp: {path} is damaged; remove it, or train the head again") from None
    known |= {key: content[key] for key in ("created", "command", "git", "versions") if key in content}
    return known | {f"data {name}": manifest for name, manifest in data.items()} | content.get("metrics", {})


def _figures(folder: Path) -> dict[str, Any]:
    """What ``calibrate`` measured, if its results lie where it puts them by default."""
    path = folder / CALIBRATION_ROWS
    if not path.is_file():
        return {}
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {
            f"{row['set']}: {row['estimator']}": {key: row[key] for key in ("auc", "log_loss", "ece", "num")}
            for row in rows
            if row["estimator"] in _SHOWN_ESTIMATORS
        }
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"specdecpp: {path} is damaged; remove it, or calibrate the head again") from None


def _serve_commands(pair: Mapping[str, Any], source: str, rule: Any) -> dict[str, str]:
    """Of the engine's default rule, and of the tuned one."""
    config: dict[str, Any] = {"method": "specdecpp", "model": pair["draft"] or "DRAFT", "head": source}
    configs = {"command": config}
    # The engine takes the tuned threshold from the head; the upper bound sizes vLLM's buffers and has to be given.
    if isinstance(rule, Mapping) and {"rule", "num_speculative_tokens"} <= rule.keys():
        configs["with the tuned rule"] = config | {name: rule[name] for name in ("rule", "num_speculative_tokens")}
    target = pair["target"] or "TARGET"
    return {name: serve_command(target, each) for name, each in configs.items()}


def serve_command(target: str, config: Mapping[str, Any]) -> str:
    """The line for a shell that serves a target with a speculative config."""
    return shlex.join(["vllm", "serve", target, "--speculative-config", json.dumps(config)])


def _dataset(folder: Path) -> dict[str, Any]:
    from dataclasses import asdict

    from vllm_specdecpp.data.shards import open_dataset

    dataset = open_dataset(folder)
    manifest = asdict(dataset.manifest)
    summary = asdict(dataset.summary())
    pair = {name: manifest.pop(name, None) for name in ("target", "draft", "target_revision", "draft_revision")}
    num_units = -(-manifest["num_prompts"] // manifest["unit_size"]) if manifest.get("unit_size") else None
    content: dict[str, Any] = {"shards": f"{len(dataset.units())} of {num_units or 'any number'}", **summary}
    if summary.get("observed"):
        content["acceptance_rate"] = summary["accepted"] / summary["observed"]
    return {
        "kind": f"dataset of {manifest.pop('kind')}, {manifest.pop('source')}",
        "where": str(folder),
        "pair": pair,
        "content": content,
        "made by": manifest,
    }


def _costs(path: Path) -> dict[str, Any]:
    from vllm_specdecpp.costs import file

    kept = file.read(path)
    named = {
        "first": "first draft pass", "step": "draft step", "verify": "verification", "read": "draft pass that reads"
    }  # fmt: skip
    return {
        "kind": COSTS,
        "where": str(path),
        "written": kept.written.isoformat(timespec="seconds"),
        "setting": dict(kept.setting),
        "seconds": {name: {str(w): s for w, s in sorted(kept.curves[curve].items())} for curve, name in named.items()},
        "learnt": dict(kept.learnt),
    }
