# SPDX-License-Identifier: Apache-2.0
"""Choose the stop rule for a machine: replay recorded rounds with its measured step costs.

Example: vllm-specdecpp tune HEAD --data DATASET --evaluate OTHER_DATASET --costs costs.json --out FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field
from tqdm import tqdm

from vllm_specdecpp.costs import file as cost_file
from vllm_specdecpp.costs.model import CostModel
from vllm_specdecpp.data.dataset import open_datasets
from vllm_specdecpp.data.manifest import Manifest
from vllm_specdecpp.data.prompts import PromptName
from vllm_specdecpp.data.rows import every_prompt
from vllm_specdecpp.files import check_free, write_whole
from vllm_specdecpp.rule_registry import RULES
from vllm_specdecpp.training import plots
from vllm_specdecpp.training.fit.held_out import TrainingData, refuse_seen, training_data
from vllm_specdecpp.training.options import POSITIONAL, CommandOptions
from vllm_specdecpp.training.replay.chains import Chains, load_chains
from vllm_specdecpp.training.replay.cost_aware import cost_aware_lengths
from vllm_specdecpp.training.replay.replay import (
    RecordedEstimator,
    fixed_lengths,
    oracle_lengths,
    survivals,
    threshold_lengths,
    walk,
)
from vllm_specdecpp.training.replay.tune_report import (
    ALL,
    COST_AWARE,
    COST_AWARE_HEAD,
    Choice,
    Walks,
    markdown,
    pareto_points,
    table_rows,
)
from vllm_specdecpp.training.trained_head import load_head

if TYPE_CHECKING:
    from vllm_specdecpp.data.shards import Dataset
    from vllm_specdecpp.head.model import AcceptanceHead

TUNED = tuple(entry.name for entry in RULES.values() if entry.threshold is not None)
FILES = ("rows.jsonl", "tune.md", "pareto.png")
THRESHOLDS = tuple(round(0.05 * i, 2) for i in range(1, 20))
BOUNDS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20)
"""Thresholds h, and upper bounds on the candidate length, that are tried."""

RESAMPLES = 1000
"""Of the prompts, behind the 95 % intervals."""


class TuneOptions(CommandOptions):
    """Replay recorded rounds under every stop rule with this machine's step costs, and keep the fastest.

    Predicts tokens per second of each fixed candidate length, of each rule over its threshold, of the engine's default
    rule with the head and without, and of an oracle that knows the outcomes; writes a table, the paper's Pareto plot,
    and the chosen rule into the head's config.json.
    """

    head: Path | None = Field(default=None, json_schema_extra=POSITIONAL)
    """Folder of the acceptance head; without one only the training-free rules are tuned."""

    data: list[Path] = Field(min_length=1)
    """Datasets of recorded rounds to choose on."""

    evaluate: list[Path] = []
    """Datasets to report on, with other prompts than the data; by default the data, which favours the rules."""

    costs: Path
    """What passes cost on this machine: the file of an engine whose rule was cost_aware; its log says where."""

    head_ms: float = Field(default=0.0, ge=0)
    """Milliseconds that the head adds to a draft pass; ``fit`` measures them."""

    out: Path
    """Folder for rows.jsonl, tune.md and pareto.png."""

    seed: int = 0
    """Of the resamples of the prompts behind the 95 % intervals."""

    write: bool = True
    """Write the chosen rule into the head's config.json."""

    force: bool = False
    """Replace an earlier result in the folder, and an earlier rule in the head's config.json."""


def run(options: TuneOptions) -> int:
    """Carry out the command.

    Raises:
        ValueError: one line: a bad option, unreadable or unfit data, prompts in both data and evaluation.
    """
    plots.check_installed()
    check_free(options.out, FILES, options.force)
    kept = cost_file.read(options.costs)
    costs, machine = CostModel(**kept.curves, max_reqs=1, max_tokens=1024), kept.setting.get("device", "")
    head_costs = with_head(costs, options.head_ms / 1000)
    datasets = open_datasets([*options.data, *options.evaluate])
    head, rules = _head_and_rules(options, datasets[0].manifest)
    trained = TrainingData() if options.head is None else training_data(options.head)
    num = len(options.data)
    refuse_seen(datasets[num:], datasets[:num], trained, "data")

    def not_fitted_to(prompt: PromptName) -> bool:
        return not trained.was_fitted_to(prompt)

    keep = not_fitted_to if trained.fitted else every_prompt
    judged = load_chains(options.evaluate, head) if options.evaluate else None
    data = load_chains(options.data, head, prompts_where=keep)
    # Rules that read no head have no training data to keep out of.
    data_of = dict.fromkeys(rules, data)
    if judged is not None and trained.fitted:
        whole = load_chains(options.data)
        data_of |= {rule: whole for rule in rules if rule != "threshold"}
    if judged is None:
        judged = data
    recorded_length = min(data.recorded_length, judged.recorded_length)
    # None beyond what was recorded can be replayed.
    bounds = [bound for bound in BOUNDS if bound < recorded_length] + [recorded_length]
    choices: dict[str, Choice] = {}
    rows: list[dict[str, Any]] = []
    for rule in rules:
        its_costs = head_costs if RULES[rule].needs_head else costs
        choices[rule] = choose(data_of[rule], its_costs, rule, head, THRESHOLDS, bounds)
    served = None if judged is data else data
    walks = _walks(judged, costs, head, head_costs, choices, recorded_length, served)
    for name in [*judged.sets, ALL]:
        chosen = judged.in_sets(None if name == ALL else [name])
        rows += table_rows(name, walks, chosen, choices, costs, RESAMPLES, options.seed)
    _write_results(options, rows, markdown(rows, costs, machine, data_of, judged), datasets[0].manifest.pair)
    if head is not None and options.write:
        _write_rule(options, choices["threshold"], machine, data, datasets[: len(options.data)])
    return 0


def with_head(costs: CostModel, seconds: float) -> CostModel:
    """The costs with ``seconds`` more in every draft pass that draws."""
    points = costs.points()
    drawn = {name: {w: s + seconds for w, s in points[name].items()} for name in ("first", "step")}
    return CostModel(**(points | drawn), max_reqs=1, max_tokens=1024)


def choose(
    chains: Chains,
    costs: CostModel,
    rule: str,
    head: AcceptanceHead | None,
    thresholds: Sequence[float],
    bounds: Sequence[int],
) -> Choice:
    """The threshold and the upper bound with the most tokens per second."""
    survival = survivals(chains, RecordedEstimator(rule, chains, head), max(bounds))
    rates: dict[Choice, float] = {}
    tried = [Choice(rule, threshold, bound) for bound in bounds for threshold in thresholds]
    for choice in tqdm(tried, desc=f"try {rule}", delay=2.0, leave=False, file=sys.stderr):
        lengths = threshold_lengths(chains, survival, choice.threshold, choice.num_speculative_tokens)
        rates[choice] = walk(chains, lengths, costs).tokens_per_second()
    return max(rates, key=lambda choice: rates[choice])


def _walks(
    chains: Chains,
    costs: CostModel,
    head: AcceptanceHead | None,
    head_costs: CostModel,
    choices: dict[str, Choice],
    max_length: int,
    served: Chains | None,
) -> Walks:
    """Every policy that is reported, on the chains that it is judged by; ``served``: what came before them."""
    walks: Walks = {
        Choice("fixed", 0.0, k): walk(chains, fixed_lengths(chains, k), costs) for k in range(1, max_length + 1)
    }
    for rule, choice in choices.items():
        survival = survivals(chains, RecordedEstimator(rule, chains, head), choice.num_speculative_tokens)
        for threshold in THRESHOLDS:
            lengths = threshold_lengths(chains, survival, threshold, choice.num_speculative_tokens)
            its_costs = head_costs if RULES[rule].needs_head else costs
            walks[choice._replace(threshold=threshold)] = walk(chains, lengths, its_costs)
    lengths = cost_aware_lengths(chains, costs, None, max_length, served)
    walks[Choice(COST_AWARE, 0.0, max_length)] = walk(chains, lengths, costs)
    if head is not None:
        lengths = cost_aware_lengths(chains, head_costs, head, max_length, served)
        walks[Choice(COST_AWARE_HEAD, 0.0, max_length)] = walk(chains, lengths, head_costs)
    walks[Choice("oracle", 0.0, max_length)] = walk(chains, oracle_lengths(chains, costs, max_length), costs)
    return walks


def _head_and_rules(options: TuneOptions, manifest: Manifest) -> tuple[AcceptanceHead | None, list[str]]:
    """The head, checked to be of the data's pair, and the rules to tune."""
    if options.head is None:
        return None, [rule for rule in TUNED if not RULES[rule].needs_head]
    head = load_head(options.head, manifest)
    if options.write and "rule" in head.metadata and not options.force:
        raise ValueError(
            f"specdecpp: head={options.head} has a tuned rule already ({head.metadata['rule']}); "
            "add --force to replace it, or --no-write to leave it"
        )
    return head, list(TUNED)


def _write_rule(options: TuneOptions, choice: Choice, machine: str, data: Chains, datasets: Sequence[Dataset]) -> None:
    from vllm_specdecpp.head.files import update_config

    names = ", ".join(dataset.folder.name for dataset in datasets)
    temperatures = sorted({str(dataset.manifest.sampling.get("temperature", "unknown")) for dataset in datasets})
    where = f" on {machine}" if machine else ""
    rule = {
        "rule": choice.rule,
        "threshold": choice.threshold,
        "num_speculative_tokens": choice.num_speculative_tokens,
        "tuned_on": f"{len(data.prompts)} prompts of {names}, temperature {', '.join(temperatures)}{where}",
    }
    assert options.head is not None
    update_config(options.head, rule=rule)
    print(f"specdecpp: wrote the rule into {options.head}/config.json", file=sys.stderr)


def _write_results(options: TuneOptions, rows: Sequence[dict[str, Any]], table: str, pair: str) -> None:
    """rows.jsonl, tune.md and pareto.png; the table also goes to the terminal."""
    write_whole(options.out / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    write_whole(options.out / "tune.md", table.encode())
    together = [row for row in rows if row["set"] == ALL]
    plots.plot_pareto(pareto_points(together), options.out / "pareto.png", f"{pair}, {together[0]['tokens']:,} tokens")
    print(table)
