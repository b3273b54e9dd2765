# SPDX-License-Identifier: Apache-2.0
"""The draft model and free runs together: recorded answers served one by one, at costs of other machines.

    python -m benchmarks.simulate.both --record DATASET [DATASET ...] --costs SETTING ... --out X.jsonl

No model runs. Temperature 0, batch 1, requests of all datasets in random order. Rules:

* ngram: vLLM's, 8 tokens behind the first place where the last five to two stand;
* suffix, draft: ours with one of the two sources;
* either: a request that drafts takes no run;
* both: ours. These four start with measured costs that are a bit off and nothing learnt, and observe times with noise;
* informed: knows costs and rates, its chances were calibrated on the other half of the requests; for which requests the
  draft model reads the prompt is chosen in hindsight;
* clairvoyant: knows what will be accepted, too (:func:`.texts.least_seconds`).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common.provenance import command_line, git_state, versions
from benchmarks.simulate.chains import Informed, Ngram, Ours, Policy, serve
from benchmarks.simulate.report import COSTS, check_free
from benchmarks.simulate.settings import SETTINGS, Setting, cost_model, true_costs
from benchmarks.simulate.texts import Text, least_seconds, recorded_texts

MODULE = "benchmarks.simulate.both"
POLICIES = ("off", "ngram", "suffix", "draft", "either", "both", "informed", "clairvoyant")
OURS: dict[str, dict[str, bool]] = {
    "suffix": {"drafts": False}, "draft": {"runs": False}, "either": {"chains": False}, "both": {},
}  # fmt: skip
DEFAULT = ("cpu_int8", "one_core", "cheap", "dear")


def served(texts: Sequence[Text], policy: Policy, setting: Setting, seed: int) -> list[float]:
    """[num_texts] seconds of each, served in random order."""
    rng = np.random.default_rng(seed)
    found = [0.0] * len(texts)
    for number in rng.permutation(len(texts)).tolist():
        found[number] = serve(texts[number], str(number), policy, setting, rng)
    return found


def informed(
    texts: Sequence[Text], halves: Sequence[Informed], setting: Setting, prices: Sequence[float]
) -> list[float]:  # fmt: skip
    """[num_texts] seconds of each.

    Args:
        texts: to serve.
        halves: calibrated on the second and on the first half of the texts.
        setting: true costs.
        prices: [num_texts] tokens per second that the rule takes to be possible.
    """
    found = [math.inf] * len(texts)
    for half, known in enumerate(halves):
        for drafts in (False, True):
            policy = copy.deepcopy(known)
            policy.rule.costs, policy.drafts = true_costs(setting), drafts
            for number in range(half, len(texts), 2):
                policy.price = prices[number]
                seconds = serve(texts[number], str(number), policy, setting, np.random.default_rng(0))
                found[number] = min(found[number], seconds)
    return found


def measure(texts: Sequence[Text], halves: Sequence[Informed], costs: str, seeds: int) -> list[dict[str, Any]]:
    """A row a set: tokens per second of each policy."""
    setting = SETTINGS[costs]
    sizes = [len(text.tokens) - text.prompt - 1 for text in texts]
    sets = list(dict.fromkeys(text.set for text in texts))

    def rates(seconds: Sequence[float]) -> dict[str, float]:
        of = {name: [i for i, text in enumerate(texts) if text.set == name] for name in sets}
        return {name: sum(sizes[i] for i in mine) / sum(seconds[i] for i in mine) for name, mine in of.items()}

    played = {"off": [served(texts, Ngram(longest=0), setting, 0)], "ngram": [served(texts, Ngram(), setting, 0)]}
    for name, options in OURS.items():
        played[name] = []
        for seed in range(seeds):
            played[name].append(served(texts, Ours(cost_model(setting, seed), **options), setting, seed))
            print(f"\r{costs} {name} {seed + 1}/{seeds} ", end="", file=sys.stderr, flush=True)
    found = {name: [rates(seconds) for seconds in runs] for name, runs in played.items()}
    usual = {name: max(rate[name] for runs in found.values() for rate in runs) for name in sets}
    knowing = [informed(texts, halves, setting, [usual[text.set] for text in texts])]
    for _ in range(2):  # a request's own rate: its tokens are given, so time that is saved is saved at that rate
        own = [size / seconds for size, seconds in zip(sizes, knowing[-1], strict=True)]
        knowing.append(informed(texts, halves, setting, own))
        print(f"\r{costs} informed {len(knowing)}/3 ", end="", file=sys.stderr, flush=True)
    found["informed"] = [{name: max(rates(seconds)[name] for seconds in knowing) for name in sets}]
    found["clairvoyant"] = [rates([least_seconds(text, setting) for text in texts])]
    print("\r", end="", file=sys.stderr)
    return [
        {"costs": costs, "set": name, "requests": sum(text.set == name for text in texts), "seeds": seeds}
        | {policy: len(runs) / sum(1 / rate[name] for rate in runs) for policy, runs in found.items()}
        | {"both_by_seed": [rate[name] for rate in found["both"]]}
        for name in sets
    ]  # fmt: skip


def mean_row(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Geometric means over the sets, of one machine's costs."""
    means = {policy: math.exp(sum(math.log(row[policy]) for row in rows) / len(rows)) for policy in POLICIES}
    return {"costs": rows[0]["costs"], "set": "mean"} | means


def line(row: Mapping[str, Any]) -> str:
    """One row of the table."""
    cells = [f"{row['off']:.2f}", *(f"{row[policy] / row['off']:.2f}" for policy in POLICIES[1:])]
    best = max(row["suffix"], row["draft"])
    cells += [f"{row['both'] / row[other]:.3f}" for other in ("either", "informed")] + [f"{row['both'] / best:.3f}"]
    return f"| {row['costs']} | {row['set']} | " + " | ".join(cells) + " |"


def page(rows: Sequence[Mapping[str, Any]], command: str) -> str:
    """The table, with its origin."""
    costs = list(dict.fromkeys(row["costs"] for row in rows))
    lines = [
        "Recorded answers at temperature 0, batch 1, simulated. **off**: tokens/s; the next seven columns are",
        "over off; then **both** over others. Rules: see `benchmarks/simulate/both.py`; mean: geometric, of the sets.",
        "",
        "| costs | set | " + " | ".join(POLICIES) + " | /either | /informed | /better of suffix, draft |",
        "|---" * (len(POLICIES) + 5) + "|",
    ]
    for name in costs:
        mine = [row for row in rows if row["costs"] == name]
        lines += [line(row) for row in [*mine, mean_row(mine)]]
    lines += ["", *(f"* {name}: {COSTS[name]}" for name in costs if name in COSTS)]
    lines += ["", "Where a recorded draft was accepted to its end, the next candidate is a guess: right as often as"]
    where = ", ".join(f"{name} {value}" for name, value in versions().items())
    return "\n".join([*lines, "the others of that request.", "", f"`{command}`", "", f"{where}; git {git_state()}", ""])


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Speed-up over off by set; one panel for each machine's costs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    costs = list(dict.fromkeys(row["costs"] for row in rows))
    size = 3.6 * len(costs), 3.8
    figure, panels = pyplot.subplots(1, len(costs), figsize=size, layout="constrained", squeeze=False)
    for panel, name in zip(panels[0], costs, strict=True):
        mine = [row for row in rows if row["costs"] == name]
        for policy, mark in zip(POLICIES[1:], "1xv^o_.", strict=True):
            panel.plot([row[policy] / row["off"] for row in mine], mark, label=policy, markersize=9, linestyle="none")
        panel.axhline(1.0, color="0.6", linewidth=0.8)
        panel.set_xticks(range(len(mine)), [row["set"] for row in mine], rotation=60, ha="right")
        panel.set_title(name, fontsize=9)
        panel.set_yscale("log")
        panel.tick_params(labelsize=7)
    panels[0, 0].set_ylabel("speed-up over off")
    panels[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--record", type=Path, nargs="+", required=True, help="datasets of vllm-specdecpp collect")
    parser.add_argument("--costs", nargs="+", default=list(DEFAULT), choices=SETTINGS)
    parser.add_argument("--seeds", type=int, default=3, help="orders of the requests; rates are means")
    parser.add_argument("--out", type=Path, required=True, help="X.jsonl; also writes X.md and X.png")
    options = parser.parse_args(argv)
    command = command_line(sys.argv[1:] if argv is None else argv, MODULE)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    try:
        check_free(options.out, force=False)
        texts = [text for folder in options.record for text in recorded_texts(folder)]
        if len(texts) < 2:
            raise ValueError(f"--record: {len(texts)} answers; give two or more")
        halves = [Informed(texts[1::2]), Informed(texts[::2])]
        for name in options.costs:
            rows += measure(texts, halves, name, options.seeds)
            mine = [row for row in rows if row["costs"] == name]
            print("\n".join(line(row) for row in [*mine, mean_row(mine)]), flush=True)
    except ValueError as error:
        print(f"{MODULE}: {error}", file=sys.stderr)
        return 2
    origin = {"command": command, "versions": versions(), "git": git_state()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("".join(json.dumps(row | origin) + "\n" for row in rows), encoding="utf-8")
    options.out.with_suffix(".md").write_text(page(rows, command), encoding="utf-8")
    plot(rows, options.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
