# SPDX-License-Identifier: Apache-2.0
"""How right the chances of free runs are: recorded answers replayed with the source `suffix` alone; no model runs.

    python -m benchmarks.simulate.runs --record DATASET --costs cpu_int8 --out benchmarks/results/X.jsonl

Every answer is served by itself, in random order: in each round the rows of the longest match that pay at these costs
are taken and verified against the answer, and the chances learn, as in the engine. What counts are the chances that
stood before a round, of the candidates whose outcome it told, of the rounds after the first ``--after``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.common.provenance import command_line, git_state, versions
from benchmarks.simulate.settings import SETTINGS, true_costs
from vllm_specdecpp.decision.cost_aware.free_runs import FreeRuns
from vllm_specdecpp.decision.sources import propose
from vllm_specdecpp.source_registry import RUN_SOURCES, make_sources
from vllm_specdecpp.training.collect.responses import read_responses
from vllm_specdecpp.training.plots import plot_reliability
from vllm_specdecpp.training.statistics import Reliability, chance_ece, reliability

MODULE = "benchmarks.simulate.runs"
MAX_LENGTH = 20
Told = tuple[int, str, float, float]
"""Round, set, chance, and 1 or 0."""
Found = dict[str, tuple[Reliability, float]]
"""Set -> its bins, and the calibration error that chance alone makes."""


def play(folder: Path, setting: str, seed: int) -> Iterator[Told]:
    """Each candidate whose outcome a round told, in the order of service.

    Raises:
        ValueError: the folder holds no answers.
    """
    answers = list(read_responses(folder))
    if not answers:
        raise ValueError(f"--record {folder}: no answers; make it with vllm-specdecpp collect")
    costs, sources = true_costs(SETTINGS[setting]), make_sources(list(RUN_SOURCES))
    runs, num_rounds = FreeRuns(sources), 0
    for number in np.random.default_rng(seed).permutation(len(answers)).tolist():
        answer = answers[number]
        prompt, output = answer["prompt_token_ids"], answer["token_ids"]
        tokens = np.array([*prompt, *output], dtype=np.int64)
        at, names = len(prompt) + 1, [str(number)]  # the first token is the prefill's
        while at < len(tokens):
            limit = np.array([min(MAX_LENGTH, len(tokens) - at)])
            taken = runs.take(names, [propose(sources, tokens[:at], MAX_LENGTH)], limit, costs)
            length, run = int(taken.lengths[0]), taken.runs[0]
            right = tokens[at : at + length] == np.array(taken.token_ids(0), dtype=np.int64)
            won = int(np.argmin(np.append(right, False)))
            if length and run is not None:
                for chance, label in zip(runs.chances(run, names[0])[: min(won + 1, length)], right, strict=False):
                    yield num_rounds, answer["set"], float(chance), float(label)
                num_rounds += 1
            runs.learn(names, taken, [length], [won])
            at += won + 1


def judge(told: Sequence[Told], after: int) -> Found:
    """Reliability, and the calibration error that chance alone would make, of all sets and of each.

    Raises:
        ValueError: there are no more rounds than ``after``.
    """
    late = [row for row in told if row[0] >= after]
    if not late:
        raise ValueError(f"--after {after}: there were {told[-1][0] + 1 if told else 0} rounds; give more answers")
    found = {}
    for name in ["all", *dict.fromkeys(row[1] for row in late)]:
        mine = [(chance, label) for _, of, chance, label in late if name in ("all", of)]
        chances, labels = torch.tensor(mine, dtype=torch.float64).T
        found[name] = reliability(chances, labels), chance_ece(chances, seed=0)
    return found


def page(found: Found, options: argparse.Namespace, num_rounds: int, command: str) -> str:
    """The table, with its origin."""
    rows = [
        f"Chances of free runs (`suffix`), costs {options.costs}, batch 1; {num_rounds} rounds with a run, of which",
        f"the first {options.after} are not counted.",
        "",
        "| set | candidates | mean chance | accepted | calibration error | by chance alone |",
        "|---|---|---|---|---|---|",
    ]
    for name, (curve, alone) in found.items():
        num = curve.num
        mean, rate = (float((num * x.nan_to_num()).sum() / num.sum()) for x in (curve.probability, curve.accept_rate))
        rows.append(f"| {name} | {int(num.sum())} | {mean:.3f} | {rate:.3f} | {curve.ece:.3f} | {alone:.3f} |")
    where = ", ".join(f"{name} {value}" for name, value in versions().items())
    return "\n".join([*rows, "", f"`{command}`", "", f"{where}; git {git_state()}", ""])


def main(argv: list[str] | None = None) -> int:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--record", type=Path, required=True, help="dataset folder of vllm-specdecpp collect")
    parser.add_argument("--costs", default="cpu_int8", choices=SETTINGS)
    parser.add_argument("--after", type=int, default=300, help="rounds with a run that are not counted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="X.jsonl; also writes X.md and X.png")
    options = parser.parse_args(argv)
    command = command_line(sys.argv[1:] if argv is None else argv, MODULE)
    try:
        if options.out.exists():
            raise ValueError(f"--out {options.out} is there already; choose another name")
        told = list(play(options.record, options.costs, options.seed))
        found = judge(told, options.after)
    except ValueError as error:
        print(f"{MODULE}: {error}", file=sys.stderr)
        return 2
    written = page(found, options, told[-1][0] + 1, command)
    rows = [
        {"set": name, "num": int(curve.num.sum()), "ece": round(curve.ece, 5), "chance_ece": round(alone, 5),
         "after": options.after, "costs": options.costs, "command": command, "versions": versions(), "git": git_state()}
        for name, (curve, alone) in found.items()
    ]  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options.out.with_suffix(".md").write_text(written, encoding="utf-8")
    panels = {name: {"suffix": curve} for name, (curve, _) in found.items()}
    plot_reliability(panels, options.out.with_suffix(".png"), "chances of free runs")
    print(written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
