# SPDX-License-Identifier: Apache-2.0
"""Say before serving whether a pair would start, what it takes and what it would bring, without starting an engine.

Example: vllm-specdecpp check TARGET DRAFT --serve="--max-model-len 4096"
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from pydantic import Field

from vllm_specdecpp.costs import file
from vllm_specdecpp.costs.model import CostModel
from vllm_specdecpp.decision.cost_aware.records import Records
from vllm_specdecpp.training.options import POSITIONAL, CommandOptions

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class CheckOptions(CommandOptions):
    """Say before serving whether a pair would start, what it takes and what it would bring. Exit status 1: it would
    not start."""

    target: str = Field(min_length=1, json_schema_extra=POSITIONAL)
    """Target model, as ``vllm serve`` takes it."""

    draft: str | None = Field(default=None, json_schema_extra=POSITIONAL)
    """Draft model; may be left out for a known pair."""

    speculative: str = "{}"
    """Further options of ``--speculative-config``, as JSON."""

    serve: str = ""
    """Further arguments of ``vllm serve`` that are the engine's, in one string: ``--serve="--max-num-seqs 8"``."""

    answers: bool = Field(default=False, alias="run")
    """Also start an engine with speculation, then one without it, and compare ten greedy answers and their speed."""

    tokens: int = Field(default=64, ge=1)
    """With ``--run``: tokens of an answer."""

    as_json: bool = Field(default=False, alias="json")
    """Print one JSON object."""

    @property
    def config(self) -> dict[str, Any]:
        """The speculative config.

        Raises:
            ValueError: ``speculative`` is no JSON object.
        """
        try:
            given = json.loads(self.speculative)
        except ValueError:
            given = None
        if not isinstance(given, dict):
            raise ValueError(f"specdecpp: --speculative {self.speculative!r} must be a JSON object")
        return {"method": "specdecpp", **({} if self.draft is None else {"model": self.draft}), **given}

    @property
    def command(self) -> str:
        """What starts the server."""
        config = self.config
        known = config == {"method": "specdecpp"}
        words = ["vllm", "serve", self.target, "--speculative-config", "specdecpp" if known else json.dumps(config)]
        return shlex.join([*words, *shlex.split(self.serve)])


def run(options: CheckOptions) -> int:
    """Print what is known before an engine starts.

    Returns:
        0, or 1 if it would not start, or if ``--run`` finds an answer that is another one.

    Raises:
        ValueError: an argument that is none.
    """
    options.config  # noqa: B018  raises
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is the report's
    found: dict[str, Any] = {"would start": True, "versions": _versions()}
    try:
        vllm_config = engine_args(options, True).create_engine_config()
        found |= _facts(options, vllm_config)
    except (ValueError, RuntimeError, OSError, NotImplementedError) as error:
        found |= {"would start": False, "because": " ".join(str(error).removeprefix("specdecpp: ").split())}
    if found["would start"] and options.answers:
        from vllm_specdecpp.engine.check_run import compare

        found["answers"] = compare(lambda speculation: engine_args(options, speculation), options.tokens)
    print(json.dumps(found, indent=2) if options.as_json else as_text(found), flush=True)
    return int(not found["would start"] or found.get("answers", {}).get("other answers", 0) > 0)


def as_text(found: dict[str, Any]) -> str:
    """The report as one screen of text: a line a fact, sections apart."""
    lines = []
    for name, content in found.items():
        if isinstance(content, dict):
            lines += ["", name, *(f"  {key:30}{_shown(value)}" for key, value in content.items())]
        else:
            lines.append(f"{name:32}{_shown(content)}")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def engine_args(options: CheckOptions, speculation: bool) -> Any:
    """The ``vllm.engine.arg_utils.EngineArgs`` of the command, or of the same one without speculation.

    Raises:
        ValueError: an argument that vLLM does not know.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    load_general_plugins()
    words = ["--model", options.target, *shlex.split(options.serve)]
    if speculation:
        words += ["--speculative-config", json.dumps(options.config)]
    try:
        return EngineArgs.from_cli_args(EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(words))
    except SystemExit as exit:
        raise ValueError(f"specdecpp: vLLM's engine does not take --serve {options.serve!r}") from exit


def _versions() -> dict[str, str]:
    from vllm_specdecpp.engine.supported import problems
    from vllm_specdecpp.provenance import versions

    found = {name: number for name, number in versions().items() if name.startswith(("vllm", "torch", "python"))}
    return found | ({"problems": "; ".join(problems())} if problems() else {})


def _facts(options: CheckOptions, vllm_config: Any) -> dict[str, Any]:
    """Sections of the report.

    Raises:
        ValueError: it does not fit in memory.
    """
    from vllm_specdecpp.config import SpecDecPPConfig
    from vllm_specdecpp.engine.check_memory import memory

    ours = SpecDecPPConfig.from_additional_config(vllm_config.additional_config["specdecpp"])
    target, speculative = vllm_config.model_config, vllm_config.speculative_config
    rows = target.get_vocab_size(), speculative.draft_model_config.get_vocab_size()
    scheduler, parallel = vllm_config.scheduler_config, vllm_config.parallel_config
    return {
        "engine": {
            "model runner": "V2" if vllm_config.use_v2_model_runner else "V1",
            "graphs": _graphs(vllm_config),
            "scheduling": "asynchronous" if scheduler.async_scheduling else "synchronous",
            "adaptive verification": bool(speculative.enable_adaptive_verification),
            "tensor parallel": parallel.tensor_parallel_size,
            "requests at once": scheduler.max_num_seqs,
            "longest sequence": target.max_model_len,
        },
        "pair": {
            "draft": ours.model if ours.drafts else "none: free runs alone",
            "rule": ours.resolved_rule,
            "head": ours.head or "none: training-free",
            "candidate length": f"0 to {ours.num_speculative_tokens}",
            "vocabulary": f"{rows[0]} rows" if rows[0] == rows[1] else f"{rows[0]} rows, the draft's {rows[1]}: padded",
        },
        "memory": memory(vllm_config),
        "expected gain": _gain(vllm_config, ours.num_speculative_tokens, ours.drafts),
        "serve": {"command": options.command},
    }


def _graphs(vllm_config: Any) -> str:
    mode, compiled = vllm_config.compilation_config.cudagraph_mode, not vllm_config.model_config.enforce_eager
    if mode is None or mode.name == "NONE":
        return "none" + (", compiled" if compiled else ", eager")
    sizes = vllm_config.compilation_config.cudagraph_capture_sizes or []
    return f"{mode.name}, {len(sizes)} sizes of the target; vLLM measures their memory at start-up"


def _gain(vllm_config: Any, longest: int, drafts: bool) -> dict[str, str]:
    """Batch size → tokens per second over those without speculation, by the costs that an engine has left."""
    import torch

    from vllm_specdecpp.engine.shared import cost_file

    if not drafts:
        return {"free runs": "by how far the text repeats itself: `vllm:specdecpp_expected_speedup` tells in service"}
    wanted = cost_file.cost_file(vllm_config, torch.device(vllm_config.device_config.device_type)).setting
    kept = _newest(cost_file.cache_folder(), wanted, vllm_config.use_v2_model_runner)
    if kept is None:
        return {"costs": "not known: the first start measures them, and logs them"}
    records = Records()
    if "admission" in kept.learnt:
        records.restore(kept.learnt["admission"]["records"])
    (accept,), _ = records.of([""])
    most = vllm_config.scheduler_config.max_num_seqs
    costs = CostModel(**kept.curves, max_reqs=most, max_tokens=most * (longest + 1))
    basis = f"of {records.known:.0f} candidates" if records.known else "guessed"
    found = {"costs": f"measured {kept.written:%Y-%m-%d %H:%M} UTC", "acceptance": f"{accept:.2f}, {basis}"}
    for num_reqs in (n for n in BATCHES if n <= most):
        seconds = costs.fixed_seconds(num_reqs, longest)
        tokens = [sum(accept**k for k in range(length + 1)) for length in range(longest + 1)]
        gains = [t * float(seconds[0] / s) for t, s in zip(tokens, seconds, strict=True)]
        best = max(range(longest + 1), key=gains.__getitem__)
        found[f"batch {num_reqs}"] = f"{gains[best]:.2f} x off, {best} candidates"
    return found


def _newest(folder: Path, wanted: dict[str, str], is_v2: bool) -> file.KeptCosts | None:
    """The last costs of this pair and machine; an engine binds its threads, so their number is not compared."""
    fits = []
    for path in folder.glob("costs-*.json"):
        try:
            kept = file.read(path)
        except ValueError as error:
            print(error, file=sys.stderr)
            continue
        same = all(kept.setting.get(name) == value for name, value in wanted.items() if name != "threads")
        if same and ("model_runner" in kept.setting) == is_v2:
            fits.append(kept)
    return max(fits, key=lambda kept: kept.written, default=None)
