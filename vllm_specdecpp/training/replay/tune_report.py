# SPDX-License-Identifier: Apache-2.0
"""What ``tune`` found, as rows and as a Markdown table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_specdecpp.costs.model import CostModel
from vllm_specdecpp.provenance import command_line
from vllm_specdecpp.training.replay.chains import Chains
from vllm_specdecpp.training.replay.replay import CUT_RATE_WARNING, Walk
from vllm_specdecpp.training.statistics import interval

COST_AWARE, COST_AWARE_HEAD = "cost_aware", "cost_aware with the head"
"""The engine's default rule, which has no threshold to choose; without a head it reads the top-1 probability."""

_UNTUNED = (COST_AWARE, COST_AWARE_HEAD, "oracle")

FEW_PROMPTS = 30
"""Below so many a threshold depends on which prompts they are: on 12 of the Qwen pair's it was off by 0.2."""

ALL = "all"
"""The set of all prompts together."""


class Choice(NamedTuple):
    """A policy with its threshold h (0 where it has none) and its upper bound on the candidate length."""

    rule: str
    threshold: float
    num_speculative_tokens: int


Walks = dict[Choice, Walk]


def table_rows(
    name: str, walks: Walks, chosen: Tensor, choices: Mapping[str, Choice], costs: CostModel, resamples: int, seed: int
) -> list[dict[str, Any]]:
    """The rows of one set: every policy with its predicted rate, its ratios, its interval and the paper's rates.

    Args:
        chosen: [num_prompts] bool, the set's prompts.
    """
    fixed = {key: w.tokens_per_second(chosen) for key, w in walks.items() if key.rule == "fixed"}
    base_key = max(fixed, key=lambda key: fixed[key])
    base = walks[base_key]
    base_rate = fixed[base_key]
    oracle_rate = next(w for key, w in walks.items() if key.rule == "oracle").tokens_per_second(chosen)
    num = int(chosen.sum())
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, num, (resamples, num), generator=generator)  # [num_resamples, num_prompts]

    def sampled(w: Walk) -> Tensor:
        return w.tokens[chosen][index].sum(1) / w.seconds[chosen][index].sum(1)  # [num_resamples]

    base_samples = sampled(base)
    default = next((w for key, w in walks.items() if key.rule == COST_AWARE), base)
    default_rate, default_samples = default.tokens_per_second(chosen), sampled(default)
    rows: list[dict[str, Any]] = []
    for key, w in walks.items():
        policy, threshold, bound = key
        rate, samples = w.tokens_per_second(chosen), sampled(w)
        low, high = interval(samples)
        over_low, over_high = interval(samples / base_samples)
        default_low, default_high = interval(samples / default_samples)
        is_rule = policy in choices
        rows.append(
            {
                "set": name,
                "policy": policy,
                "threshold": threshold if is_rule else None,
                "num_speculative_tokens": bound,
                "chosen": choices[policy] == key if is_rule else key == base_key,
                "prompts": num,
                "tokens": int(w.tokens[chosen].sum()),
                "rounds": int(w.rounds[chosen].sum()),
                "tokens_per_second": rate,
                "tokens_per_second_low": low,
                "tokens_per_second_high": high,
                "over_off": rate * costs.verify.at(1),
                "best_fixed_k": base_key.num_speculative_tokens,
                "over_best_fixed": rate / base_rate,
                "over_best_fixed_low": over_low,
                "over_best_fixed_high": over_high,
                "over_cost_aware": rate / default_rate,
                "over_cost_aware_low": default_low,
                "over_cost_aware_high": default_high,
                "gap_closed": (rate - base_rate) / (oracle_rate - base_rate) if oracle_rate > base_rate else None,
                **w.rates(chosen),
            }
        )
    return rows


def verdict(rows: Sequence[Mapping[str, Any]]) -> tuple[bool, str] | None:
    """Whether the head pays, and why, in one sentence; None without a head.

    The default rule with the head against the same rule without, on the same prompts; the interval is by bootstrap over
    prompts. A head pays if all of it lies above 0; too few prompts make it too narrow.

    Args:
        rows: of prompts that nothing was fitted to.
    """
    found = [row for row in rows if (row["set"], row["policy"]) == (ALL, COST_AWARE_HEAD)]
    if not found:
        return None
    (row,) = found
    over, low, high = (row[f"over_cost_aware{end}"] for end in ("", "_low", "_high"))
    figures = (
        f"{row['tokens_per_second']:.2f} predicted tokens/s with it, {row['tokens_per_second'] / over:.2f} with the "
        f"default rule alone ({over - 1:+.1%}, 95 % interval {low - 1:+.1%} to {high - 1:+.1%}, "
        f"{row['prompts']} held-out prompts)"
    )
    if row["prompts"] < FEW_PROMPTS:
        return False, f"Too few held-out prompts to say whether a head pays, give {FEW_PROMPTS} or more: {figures}."
    told = "does not pay, " + ("it costs more than it brings" if high < 1 else "the difference is within noise")
    told = "pays" if low > 1 else told
    return low > 1, f"A head for this pair on this machine {told}: {figures}."


def markdown(
    rows: Sequence[Mapping[str, Any]], costs: CostModel, machine: str, data_of: Mapping[str, Chains], judged: Chains
) -> str:
    """The table of the chosen policies, with what it rests on and what to doubt.

    Args:
        machine: that the costs are of.
        data_of: rule → what its threshold was chosen on.
        judged: what the rows are of.
    """
    num_prompts = {rule: len(data.prompts) for rule, data in data_of.items()}
    own = min(num_prompts.values())
    others = [rule for rule, num in num_prompts.items() if num > own]
    tuned_on = f"Tuned on {own} prompts"
    if others:
        tuned_on += f" that the head was not trained on ({', '.join(others)}: on all {num_prompts[others[0]]})"
    same = any(judged is data for data in data_of.values())
    lines = ["# Predicted tokens/s of the stop rules", ""]
    lines += [
        f"* Command: `{command_line()}`",
        f"* Costs of {machine or 'an unknown machine'}; {1 / costs.verify.at(1):.2f} tok/s without speculation",
        f"* {tuned_on}; judged on "
        + ("the same ones, which favours the rules." if same else f"{len(judged.prompts)} others."),
        "* Best K is chosen on the very set it is judged by, which favours it. Prefill is left out.",
        f"* {COST_AWARE} is the engine's default and has nothing to tune; it learns as it serves, and here starts "
        + ("cold." if same else "with what it has learnt of the prompts tuned on."),
    ]
    if not same and (said := verdict(rows)):
        lines.append(f"* {said[1]}")
    if own < FEW_PROMPTS:
        lines.append(
            f"* Warning: thresholds that were chosen on {own} prompts are uncertain; give --data more that the head "
            "was not trained on, or train with a larger --validation."
        )
    lines += [f"* {warning}" for warning in warnings(rows, costs)]
    lines += [
        "",
        "| set | policy | tok/s | over off | over best K (95 %) | gap to oracle closed | length | accepted "
        "| N_target/N | N_discarded/N | cut |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if not (row["chosen"] or row["policy"] in _UNTUNED):
            continue
        gap = "" if row["gap_closed"] is None else f"{row['gap_closed']:.0%}"
        over = f"{row['over_best_fixed'] - 1:+.1%}"
        if row["policy"] not in ("fixed", "oracle"):
            over += f" ({row['over_best_fixed_low'] - 1:+.1%} … {row['over_best_fixed_high'] - 1:+.1%})"
        lines.append(
            f"| {row['set']} | {_label(row)} | {row['tokens_per_second']:.2f} | {row['over_off']:.2f}× | {over} "
            f"| {gap} | {row['mean_candidate_length']:.1f} | {row['acceptance']:.0%} | {row['verification_rate']:.3f} "
            f"| {row['discard_rate']:.3f} | {row['cut_rate']:.1%} |"
        )
    return "\n".join(lines) + "\n"


def pareto_points(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one set as points of :func:`vllm_specdecpp.training.plots.plot_pareto`."""
    points = []
    for row in rows:
        untuned = row["policy"] in _UNTUNED
        label = f"K={row['num_speculative_tokens']}" if row["policy"] == "fixed" else f"h={row['threshold'] or 0:g}"
        points.append(
            {
                "group": "fixed K" if row["policy"] == "fixed" else row["policy"],
                "label": None if untuned else label,
                "emphasis": row["chosen"] or (untuned and row["policy"] != "oracle"),
                "discard_rate": row["discard_rate"],
                "verification_rate": row["verification_rate"],
            }
        )
    return points


def warnings(rows: Sequence[Mapping[str, Any]], costs: CostModel) -> list[str]:
    """What makes the prediction doubtful, one line each."""
    found = []
    told = [row for row in rows if row["set"] == ALL and (row["chosen"] or row["policy"] in _UNTUNED)]
    for row in told:
        if row["cut_rate"] > CUT_RATE_WARNING:
            found.append(
                f"Warning: {row['cut_rate']:.1%} of the rounds of {_label(row)} outrun the record; "
                "collect with more --candidates."
            )
    longest = max(row["num_speculative_tokens"] for row in told)
    if longest >= (measured := costs.verify.widths[-1]):
        found.append(f"Warning: costs were measured up to {measured - 1} candidates and extrapolated to {longest}.")
    return found


def _label(row: Mapping[str, Any]) -> str:
    if row["policy"] == "fixed":
        return f"best fixed K={row['num_speculative_tokens']}"
    if row["policy"] in _UNTUNED:
        return str(row["policy"])
    return f"{row['policy']} h={row['threshold']:g} K≤{row['num_speculative_tokens']}"
