# SPDX-License-Identifier: Apache-2.0
"""What each mechanism of the cost-aware rule earns: simulated with all of them, and without one at a time.

    python -m benchmarks.simulate_ablation --streams markov shift --seeds 8 --out benchmarks/results/x.jsonl

Each cell is served by the whole rule and by each ablated one, on the same text, with the same noise in what they
observe and in what start-up measured. A ratio below 1 is what the mechanism earns, one above 1 is what it costs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import simulate
from benchmarks.provenance import command_line, git_state, versions
from benchmarks.simulate_rules import Engine
from benchmarks.simulate_server import Server
from benchmarks.simulate_settings import SETTINGS, cost_model
from benchmarks.simulated_streams import STREAMS
from vllm_specdecpp.decision.cost_aware.rule import CostAwareRule

WORTH = 0.005
"""A mechanism that earns less than this in every cell is to go."""
SIGMAS = 2.5
"""Standard errors that a difference must exceed besides."""


def has_acted(rule: CostAwareRule) -> set[str]:
    """A set that will hold the mechanisms that changed a decision of this rule: without the others it decides alike."""
    acted = {"calibration"}

    def watch(owner: object, method: str, name: str) -> None:
        inner = getattr(owner, method)

        def outer(*args: Any) -> Any:
            found = inner(*args)
            if found is not None and found is not False:
                acted.add(name)
            return found

        setattr(owner, method, outer)

    watch(rule, "_trial", "trials")
    watch(rule, "_should_time_off", "time_off")
    if rule.guard is not None:
        watch(rule.guard, "tick", "guard")
    notice = rule.start._notice_change

    def watched_notice(*args: Any) -> None:
        before = rule.start._accepted
        notice(*args)
        if rule.start._accepted != before:
            acted.add("change")

    setattr(rule.start, "_notice_change", watched_notice)  # noqa: B010
    return acted


def _never_judge(rule: CostAwareRule) -> None:
    if rule.guard is not None:  # it goes on counting: trial rounds read its best fixed length
        setattr(rule.guard, "_judge", lambda rate: None)  # noqa: B010


ABLATIONS: dict[str, Callable[[CostAwareRule], None]] = {
    "guard": _never_judge,
    "trials": lambda rule: setattr(rule, "_trial", lambda limits, drafts: None),
    "calibration": lambda rule: setattr(rule, "adapt", False),
    "change": lambda rule: setattr(rule.start, "_notice_change", lambda mean, num, step, probe: None),
    "time_off": lambda rule: setattr(rule, "_should_time_off", lambda num_reqs: False),
}
"""Name -> takes just that mechanism out of a rule that has not served yet."""
WHAT = {
    "guard": "the watch that yields to a fixed length never judges (trial rounds go on)",
    "trials": "no round with the watch's best fixed length for the sake of its time",
    "calibration": "scores are taken for probabilities, as they come",
    "change": "the gate's means start anew at no change of the workload",
    "time_off": "no round without drafting for the sake of its time",
}


def without(rule: CostAwareRule, names: Sequence[str]) -> CostAwareRule:
    """The rule, with these mechanisms taken out of it."""
    for name in names:
        ABLATIONS[name](rule)
    return rule


def serve(
    cell: tuple[str, str, int], options: argparse.Namespace, sets: Sequence[tuple[str, ...]]
) -> tuple[list[float], float]:
    """Tokens per second of the rule without each of ``sets``, for (costs, stream, seed); and those of K = 0."""
    costs, stream, seed = cell
    setting = SETTINGS[costs]
    streams = simulate.streams_of(stream, setting, options, seed)
    server = Server(setting, streams, simulate.tokens_of(setting, options.tokens), reads=not options.no_reading)
    rates: list[float] = []
    acted: set[str] = set()
    for names in sets:
        played = Engine(cost_model(setting, seed))
        without(played.rule, names)
        if not names:
            acted = has_acted(played.rule)
        elif not acted & set(names):
            rates.append(rates[0])
            continue
        rates.append(server.play(played, seed).rate)
    return rates, setting.batch / setting.verify(setting.batch)


def summary(ratios: Mapping[tuple[str, str], Sequence[float]]) -> tuple[float, tuple[float, float]]:
    """Mean of the log-ratios as a ratio, and of the cells' means the least and greatest."""
    means = [geometric(values) for values in ratios.values()]
    return geometric(means), (min(means), max(means))


def geometric(values: Sequence[float]) -> float:
    return math.exp(float(np.mean(np.log(values))))


def error(values: Sequence[float]) -> float:
    """Standard error of the mean log-ratio; infinite for one seed."""
    return float(np.std(np.log(values), ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.inf


def cell_text(values: Sequence[float]) -> str:
    """A ratio; bold where it is a difference worth naming."""
    ratio, spread = geometric(values), error(values)
    text = f"{ratio:.4f}"
    return f"**{text}**" if abs(ratio - 1) >= WORTH and abs(math.log(ratio)) > SIGMAS * spread else text


def write(rows: Sequence[Mapping[str, Any]], out: Path, command: str) -> None:
    """``out`` (JSONL), and beside it the page (.md)."""
    origin = {"command": command, "versions": versions(), "git": git_state()}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps({**row, **origin}) + "\n" for row in rows), encoding="utf-8")
    out.with_suffix(".md").write_text(page(rows, command), encoding="utf-8")


def page(rows: Sequence[Mapping[str, Any]], command: str) -> str:
    """The table, and what each column says over all cells."""
    names = list(rows[0]["without"])
    seeds = len(rows[0]["rates"])
    lines = [
        "Tokens/s of `cost_aware`, simulated, and the ratio to it of the same rule without one mechanism. Below 1: the",
        f"mechanism earns that much; above 1: it costs. Means over {seeds} seeds, the same text and the same noise for",
        f"each column. Bold: {WORTH:.1%} or more, and beyond {SIGMAS} standard errors.",
        *([] if rows[0]["reads"] else ["The draft model knows every prompt for nothing: the stop rule is judged."]),
        "",
        f"| costs | batch | stream | /off | cost_aware | {' | '.join(f'−{name}' for name in names)} | noise |",
        "|---" * (6 + len(names)) + "|",
    ]
    lines += map(_row, rows)
    lines += [
        "",
        f"noise: the largest standard error in the row. Over all {len(rows)} cells:",
        "",
        "| without | geometric mean | least | greatest | cells it earns in | cells it costs in |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        cells = {
            (row["costs"], row["stream"]): (np.array(row["without"][name]) / np.array(row["rates"])).tolist()
            for row in rows
        }
        mean, (least, most) = summary(cells)
        ordered = sorted(cells.items(), key=lambda item: geometric(item[1]))
        earns = [f"{c} {s}" for (c, s), values in ordered if "**" in cell_text(values) and geometric(values) < 1]
        loses = [f"{c} {s}" for (c, s), values in ordered[::-1] if "**" in cell_text(values) and geometric(values) > 1]
        lines.append(f"| {name} | {mean:.4f} | {least:.4f} | {most:.4f} | {_few(earns)} | {_few(loses)} |")
    lines += ["", *(f"* −{name}: {WHAT[name]}." for name in names if name in WHAT)]
    known = ", ".join(f"{name} {version}" for name, version in versions().items())
    return "\n".join([*lines, "", f"`{command}`", "", f"{known}; git {git_state()}", ""])


def _row(row: Mapping[str, Any]) -> str:
    whole = np.array(row["rates"])
    ratios = [(np.array(rates) / whole).tolist() for rates in row["without"].values()]
    noise = max(error(values) for values in ratios)
    return (
        f"| {row['costs']} | {row['batch']} | {row['stream']} | {whole.mean() / np.mean(row['off']):.3f} "
        f"| {whole.mean():.2f} | {' | '.join(map(cell_text, ratios))} | {noise:.4f} |"
    )


def _few(cells: Sequence[str], most: int = 4) -> str:
    return f"{len(cells)}" + (f" ({', '.join(cells[:most])}{', …' if len(cells) > most else ''})" if cells else "")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulate_ablation", description=summary)
    parser.add_argument("--costs", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--streams", nargs="+", default=list(STREAMS), help="as for benchmarks.simulate")
    parser.add_argument(
        "--without", nargs="+", default=list(ABLATIONS), metavar="NAME[+NAME...]",
        help=f"one column each, mechanisms joined by + go together: {', '.join(ABLATIONS)}",
    )  # fmt: skip
    parser.add_argument("--record", type=Path, help="dataset folder of vllm-specdecpp collect, for recorded streams")
    parser.add_argument("--tokens", type=int, default=4000, help="tokens that each rule emits; more for batches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--no-reading", action="store_true", help="the draft model knows every prompt for nothing")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--out", type=Path, help="result rows (JSONL), with a page (.md) beside them")
    parser.add_argument("--force", action="store_true", help="replace files that are there")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print the table; write it with ``--out``."""
    options = make_parser().parse_args(argv)
    sets = [(), *(tuple(name.split("+")) for name in options.without)]
    unknown = {name for names in sets for name in names} - ABLATIONS.keys()
    command = command_line(sys.argv[1:] if argv is None else argv, "benchmarks.simulate_ablation")
    cells = [(costs, stream) for costs in options.costs for stream in options.streams]
    seeds = range(options.seed, options.seed + options.seeds)
    rows: list[dict[str, Any]] = []
    try:
        if unknown:
            raise ValueError(f"specdecpp: --without {', '.join(sorted(unknown))}; choose among {', '.join(ABLATIONS)}")
        if options.out is not None:
            for path in (options.out, options.out.with_suffix(".md")):
                if path.exists() and not options.force:
                    raise ValueError(f"specdecpp: {path} is there already; choose another name or pass --force")
        for stream in options.streams:
            simulate.streams_of(stream, SETTINGS[options.costs[0]], options, options.seed)
        with ProcessPoolExecutor(options.jobs) as pool:
            todo = [(*cell, seed) for cell in cells for seed in seeds]
            served = pool.map(partial(serve, options=options, sets=sets), todo)
            for costs, stream in cells:
                here = [next(served) for _ in seeds]
                columns = np.array([rates for rates, _ in here]).T  # [1 + num_ablations, num_seeds]
                rows.append({
                    "costs": costs,
                    "reads": not options.no_reading,
                    "batch": SETTINGS[costs].batch,
                    "stream": stream,
                    "off": [round(off, 4) for _, off in here],
                    "rates": columns[0].round(4).tolist(),
                    "without": {n: c.round(4).tolist() for n, c in zip(options.without, columns[1:], strict=True)},
                })  # fmt: skip
                print(_row(rows[-1]), flush=True)
                if options.out is not None:  # after each: a long run that is ended leaves what it has
                    write(rows, options.out, command)
    except ValueError as problem:
        print(f"benchmarks.simulate_ablation: {problem}", file=sys.stderr)
        return 2
    print(page(rows, command))
    return 0


if __name__ == "__main__":
    sys.exit(main())
