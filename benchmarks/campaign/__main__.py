# SPDX-License-Identifier: Apache-2.0
"""Measure what a user could pick, side by side: pair x set x temperature x batch x method, from one YAML file.

    python -m benchmarks.campaign benchmarks/campaign/qwen2.5-coder-int8.yaml --models DIR --data DIR \
        --out benchmarks/results/X.jsonl --minutes 120
    python -m benchmarks.campaign ... --quick               # batch 1, one prompt a set: about 15 minutes

A cell's prompts are answered in groups of its batch size; all methods of the cell answer a group, in a rotated order,
before the next group's. Every turn visits all cells, so that a run that is cut short has something of each. The
engines live through all cells, and with them what the rules have learnt, as in a server whose load changes.
Raw rows are appended to X.raw.jsonl: run the same command again to go on after an interruption. The last line of the
output is one JSON object.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.campaign.config import Campaign, load
from benchmarks.campaign.report import write_report
from benchmarks.common import options, session
from benchmarks.common.records import RawFile, Row, load_prompts, make_groups

MODULE = "benchmarks.campaign"


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=summary)
    parser.add_argument("campaign", type=Path, help="the YAML file (benchmarks.campaign.config)")
    parser.add_argument("--models", type=Path, help="folder of the models that the file names")
    parser.add_argument("--data", type=Path, required=True, help="folder with eval_SET.jsonl")
    parser.add_argument("--quick", action="store_true", help="the file's first part, one group a set")
    options.add_resume_options(parser)
    return parser


def quick(campaign: Campaign) -> Campaign:
    """The first part at its smallest batch, one group a set."""
    first = campaign.parts[0]
    part = first.model_copy(update={"groups": 1, "batches": [min(first.batches)]})
    return campaign.model_copy(update={"parts": [part], "turns": 1})


def make_cells(campaign: Campaign, prompts: Mapping[str, list[Row]]) -> list[session.Unit]:
    """The units of all cells, turn after turn, while a set has prompts."""
    return [
        session.Unit(group, part.temperature, {"temperature": part.temperature, "batch": batch}, part.parsed())
        for turn in range(campaign.turns)
        for part in campaign.parts
        for batch in part.batches
        for rows in prompts.values()
        for group in make_groups(rows, batch)[turn * part.groups : (turn + 1) * part.groups]
    ]


def settings_of(campaign: Campaign, args: argparse.Namespace) -> argparse.Namespace:
    """The file's settings and the command line's, as the other benchmarks' options name them."""

    def place(name: str) -> str:
        folder = None if args.models is None else args.models / name
        return str(folder) if folder is not None and folder.is_dir() else name

    known: dict[str, Any] = campaign.model_dump(exclude={"target", "draft", "other_drafts", "head", "parts", "sets"})
    return argparse.Namespace(
        **known,
        **vars(args),
        pair=(place(campaign.target), place(campaign.draft)),
        other_drafts={name: place(folder) for name, folder in campaign.other_drafts.items()},
        head=campaign.head and place(campaign.head),
    )


def main(argv: list[str] | None = None) -> int:
    """Command line: see the module's docstring."""
    return options.command(MODULE, make_parser(), _main, argv)


def _main(args: argparse.Namespace, argv: Sequence[str], started: float) -> int:
    campaign = load(args.campaign)
    campaign = quick(campaign) if args.quick else campaign
    args = settings_of(campaign, args)
    raw_path = options.check_paths(args)
    prompts = load_prompts(args.data, [s for sets in campaign.sets.values() for s in sets], campaign.prompts_needed())
    units = make_cells(campaign, prompts)
    raw = RawFile(raw_path)
    provenance = options.provenance(argv, MODULE, campaign.methods)
    drafts = {name: options.model_label(folder) for name, folder in args.other_drafts.items()}
    settings = options.shared_settings(args) | {"other_drafts": drafts}
    report = {"judged": campaign.judged, "cells": campaign.methods_by_cell(), "families": campaign.sets}
    raw.start_run(settings, provenance | report)
    if not session.execute(args, raw, units, campaign.methods, started):
        print("time is up; the same command goes on. To report what is there:")
        print(f"  python -m benchmarks.campaign.report {raw_path} --out {args.out}")
        return 0
    print(write_report(raw, args.out, args.force))
    return 0


if __name__ == "__main__":
    sys.exit(main())
