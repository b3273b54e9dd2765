# SPDX-License-Identifier: Apache-2.0
"""Does the shrunk draft pay? Plays the same prompts with both drafts, one engine after the other, and reckons.

The texts are the target's own either way (greedy decoding is lossless), so what differs is how many candidates are
accepted and what a pass costs. Both are measured in an engine of the pair; the speed is predicted from them by the cost
model, at the best fixed candidate length of each draft and batch.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_specdecpp.costs.model import CostModel, Points
from vllm_specdecpp.training.collect.stop_signal import ends_with_children
from vllm_specdecpp.training.engine import costs_of, environment, start_engine

if TYPE_CHECKING:
    from vllm_specdecpp.shrink.options import ShrinkOptions

BATCHES = (1, 4, 16)
CANDIDATES = 8
"""Of a played round, and at most of a predicted one."""
PAYS = 1.02
"""Faster than this at one of the batches; less is within the noise of the measured passes."""
LOSES = 0.98
"""Slower than this at none of them."""
_LONGEST = 2048
"""Tokens of a prompt that is played."""
_WARM_UP = 32
"""Tokens that the default rule answers first: it learns what a round takes beside the passes."""


@dataclass(frozen=True)
class Played:
    """What an engine showed of one draft."""

    agrees: list[list[bool]]
    """A prompt's positions at which the draft's first choice was verified: whether it was the target's token."""

    curves: Points
    """As measured; see :class:`CostModel`."""

    @property
    def agreement(self) -> float:
        """Share of the positions, 0 to 1."""
        places = [place for row in self.agrees for place in row]
        return sum(places) / max(len(places), 1)


def check(options: ShrinkOptions) -> int:
    """Measure, print a table, and say whether the shrunk draft pays.

    Returns:
        Exit status: 0 if it pays, else 1.

    Raises:
        ValueError: one line: no prompts, or an engine does not start.
    """
    prompts = read_prompts(options)
    # A cache of its own: both drafts are timed now, and what earlier engines kept stays as it is.
    with (
        tempfile.TemporaryDirectory() as cache,
        ends_with_children(functools.partial(shutil.rmtree, cache, ignore_errors=True)),
        environment("VLLM_CACHE_ROOT", cache),
    ):
        original = play(options, options.draft, prompts)
        shrunk = play(options, str(options.out.expanduser()), prompts)
    lines, pays = report(original, shrunk)
    print("\n".join(lines))
    return 0 if pays else 1


def read_prompts(options: ShrinkOptions) -> list[list[int]]:
    """Token ids of the prompts to play.

    Raises:
        ValueError: one line: there are none that are short enough.
    """
    from transformers import AutoTokenizer

    from vllm_specdecpp.data.manifest import MANIFEST_FILE
    from vllm_specdecpp.data.prompts import encode, load_prompts
    from vllm_specdecpp.training.collect.responses import read_responses

    assert options.prompts is not None and options.target is not None
    folder = Path(options.prompts).expanduser()
    if (folder / MANIFEST_FILE).is_file():
        found = [row["prompt_token_ids"] for row in read_responses(folder)]
    else:
        tokenizer = AutoTokenizer.from_pretrained(options.target)
        found = [encode(tokenizer, prompt.text) for prompt in load_prompts(options.prompts)]
    short = [ids for ids in found if 0 < len(ids) <= _LONGEST]
    if not short:
        raise ValueError(f"specdecpp: prompts={options.prompts!r} holds none of 1 to {_LONGEST} tokens; give others")
    # Spread over the source: its sets often stand one after the other.
    num = min(options.num_prompts, len(short))
    return [short[i * len(short) // num] for i in range(num)]


def play(options: ShrinkOptions, draft: str, prompts: Sequence[Sequence[int]]) -> Played:
    """Let an engine of the pair answer the prompts greedily, with :data:`CANDIDATES` candidates a round.

    Raises:
        ValueError: it does not start.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import SamplingParams

    print(f"specdecpp: starting an engine with the draft {draft} ...", file=sys.stderr)
    config = {
        "model": draft, "num_speculative_tokens": CANDIDATES, "trace_rounds": len(prompts) * options.max_tokens
    }  # fmt: skip
    longest = max(map(len, prompts)) + max(options.max_tokens, _WARM_UP) + CANDIDATES + 1
    llm = start_engine(str(options.target), config, options, max_model_len=longest, max_num_seqs=max(BATCHES))
    try:
        inputs: list[Any] = [{"prompt_token_ids": list(ids)} for ids in prompts]
        params = SamplingParams(temperature=0.0, max_tokens=_WARM_UP, ignore_eos=True, detokenize=False)
        llm.generate(inputs[:1], params, use_tqdm=False)
        points = costs_of(llm)
        llm.collective_rpc("specdecpp_configure", kwargs={"rule": "fixed"})
        llm.collective_rpc("specdecpp_rounds", kwargs={"clear": True})
        params = SamplingParams(temperature=0.0, max_tokens=options.max_tokens, detokenize=False)
        llm.generate(inputs, params)
        rounds = llm.collective_rpc("specdecpp_rounds")[0]
    finally:
        llm.llm_engine.engine_core.shutdown()
    return Played(agreements(rounds), points)


def agreements(rounds: Sequence[dict[str, Any]]) -> list[list[bool]]:
    """Of each request, whether the draft was right where it was verified; nothing is known after a first rejection, nor
    in the place of a bonus token.

    Args:
        rounds: as ``specdecpp_rounds`` gives them.
    """
    found: dict[str, list[bool]] = {}
    for row in rounds:
        places = found.setdefault(row["request_id"], [])
        places += [True] * row["accepted"]
        places += [False] * (row["accepted"] < len(row["candidates"]))
    return list(found.values())


def tokens_per_second(agrees: Sequence[Sequence[bool]], costs: CostModel, batch: int) -> tuple[float, int]:
    """Best predicted speed of a batch of such texts over the fixed candidate lengths, and that length; 0 is off."""
    seconds = costs.fixed_seconds(batch, CANDIDATES)  # [CANDIDATES + 1]
    best = (batch / float(seconds[0]), 0)
    for length in range(1, CANDIDATES + 1):
        tokens = rounds = 0
        for row in agrees:
            here = 0
            while here < len(row):
                accepted = 0
                while accepted < length and here + accepted < len(row) and row[here + accepted]:
                    accepted += 1
                here, tokens, rounds = here + accepted + 1, tokens + accepted + 1, rounds + 1
        if rounds:
            best = max(best, (batch * tokens / (rounds * float(seconds[length])), length))
    return best


def report(original: Played, shrunk: Played) -> tuple[list[str], bool]:
    """The table's lines, and whether the shrunk draft pays."""
    # The target is the same in both engines: what its passes seemed to cost there is noise between the two.
    both = original.curves["verify"], shrunk.curves["verify"]
    verify = {width: min(both[0][width], both[1][width]) for width in both[0].keys() & both[1].keys()}
    models = []
    for played in (original, shrunk):
        curves: dict[str, Any] = {**played.curves, "verify": verify}
        models.append(CostModel(**curves, max_tokens=max(BATCHES) * (1 + CANDIDATES)))
    lost = 100 * (original.agreement - shrunk.agreement)
    num = sum(map(len, shrunk.agrees))
    lines = [
        f"{'':26}{'original':>10}{'shrunk':>10}",
        f"{'greedy agreement':26}{original.agreement:10.1%}{shrunk.agreement:10.1%}   "
        f"{lost:.1f} points lost ({num} places of {len(shrunk.agrees)} prompts)",
    ]
    ratios = []
    for batch in BATCHES:
        old, new = (1e3 * model.step.at(batch) for model in models)
        lines.append(f"{f'a draft pass, batch {batch}':26}{old:7.1f} ms{new:7.1f} ms   {new / old:.2f} of the time")
    for batch in BATCHES:
        (old, k), (new, n) = (
            tokens_per_second(p.agrees, m, batch) for p, m in zip((original, shrunk), models, strict=True)
        )
        ratios.append(new / old)
        lines.append(
            f"{f'tokens/s, batch {batch}':26}{old:10.1f}{new:10.1f}   {new / old:.2f}, predicted, K {k} and {n}"
        )
    pays = max(ratios) > PAYS and min(ratios) >= LOSES
    lines.append("it pays" if pays else "it would not pay: serve the original")
    return lines, pays
