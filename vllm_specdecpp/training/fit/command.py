# SPDX-License-Identifier: Apache-2.0
"""From a pair of models to a tuned acceptance head, and the verdict whether it pays: all stages in one command.

Example: vllm-specdecpp fit --target TARGET --draft DRAFT --prompts prompts.jsonl --out mine
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_specdecpp.data.prompts import Prompt, load_prompts, split_by_id
from vllm_specdecpp.files import write_whole
from vllm_specdecpp.training.fit.options import FitOptions, settings
from vllm_specdecpp.training.fit.stages import num_done, stages_of
from vllm_specdecpp.training.fit.train import TrainOptions
from vllm_specdecpp.training.model_config import model_config
from vllm_specdecpp.training.replay.tune_report import FEW_PROMPTS, verdict

SETTINGS_FILE = "fit.json"


def run(options: FitOptions) -> int:
    """Carry out the stages that are not done, and say whether the head pays.

    Raises:
        ValueError: one line: too few prompts, a folder with other settings or other files, or a stage's own.
        KeyboardInterrupt: the user ended it; finished stages and units stay.
    """
    options = options.model_copy(update={"out": options.out.expanduser()})
    prompts = load_prompts(options.prompts, options.limit, options.split, options.column)
    fitted, judging = divided(prompts, options.held_out, options.seed)
    for role in ("target", "draft"):
        model_config(getattr(options, role), role)  # or the folder would be claimed for what is no model
    claim(options.out, settings(options, prompts))
    stages = stages_of(options, fitted, judging)
    first = num_done(stages)
    for number, stage in enumerate(stages):
        is_there = ", which is there" if number < first else ""
        print(f"fit {number + 1}/{len(stages)}: {stage.name}, to {stage.output}{is_there}", file=sys.stderr)
        if number >= first:
            with contextlib.redirect_stdout(sys.stderr):  # what engines print is progress; stdout is the verdict's
                stage.run()
    rows = [json.loads(line) for line in (options.out / "tune" / "rows.jsonl").read_text().splitlines()]
    said = verdict(rows)
    assert said is not None
    pays, sentence = said
    print(f"{sentence}\nServe it {'with' if pays else 'without'} the head:")
    config = {"method": "specdecpp", "model": options.draft}
    if options.draft_sample_method != "greedy":
        config["draft_sample_method"] = options.draft_sample_method
    if pays:
        config["head"] = str(options.out / "head")
    print(shlex.join(["vllm", "serve", options.target, "--speculative-config", json.dumps(config)]))
    return 0


def divided(prompts: Sequence[Prompt], held_out: float, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to fit to, and those that judge; a text that is there twice counts once.

    Raises:
        ValueError: too few to train, to end training early, or to judge.
    """

    def place(prompt: Prompt) -> str:
        return hashlib.sha256(f"{seed}:{prompt.text}".encode()).hexdigest()

    by_text: dict[str, Prompt] = {}
    for prompt in prompts:
        by_text.setdefault(prompt.text, prompt)
    once = list(by_text.values())
    judging = set(sorted(once, key=place)[: round(held_out * len(once))])
    fitted = [prompt for prompt in once if prompt not in judging]
    share = TrainOptions.model_fields["validation"].default
    num_early = sum(split_by_id(prompt.id, share, seed) for prompt in fitted)
    if not judging or not 0 < num_early < len(fitted):
        raise ValueError(
            f"specdecpp: prompts: {len(once)} are too few to train a head and to judge it; give more, at best "
            f"{round(FEW_PROMPTS / held_out)} at least"
        )
    return fitted, [prompt for prompt in once if prompt in judging]


def claim(out: Path, made_with: dict[str, Any]) -> None:
    """Make the folder one of these settings, or find that it is.

    Raises:
        ValueError: it holds other files, was made with other settings (the first is named), or is damaged.
    """
    path = out / SETTINGS_FILE
    if not path.exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"specdecpp: out={out} holds other files; name a new or empty folder")
        write_whole(path, (json.dumps(made_with, indent=2) + "\n").encode())
        return
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"specdecpp: {path} cannot be read ({error}); restore it, or name another --out") from None
    for name, value in made_with.items():
        if before.get(name) != value:
            option = name.replace("_", "-")
            raise ValueError(
                f"specdecpp: out={out} was made with --{option} {before.get(name)!r}, not {value!r}; give that, or "
                "name another --out"
            )
