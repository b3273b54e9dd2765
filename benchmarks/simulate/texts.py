# SPDX-License-Identifier: Apache-2.0
"""Recorded greedy answers, and what the draft model and a free run would propose at every place in them.

At temperature 0 the text is the same whatever is proposed, so a place in it has one draft and one run, and from where
drafting starts does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.simulate.settings import Setting
from benchmarks.simulate.streams import DEPTH
from vllm_specdecpp.data.shards import open_dataset
from vllm_specdecpp.decision.sources import Run, propose
from vllm_specdecpp.decision.sources.suffix import SuffixSource
from vllm_specdecpp.training.collect.responses import read_responses

SOURCES = (SuffixSource(),)
WRONG = -1
"""Stands for a candidate that is not the target's token."""
Draft = tuple[list[int], list[float]]
"""Candidates that the draft model draws, and the score of each."""


@dataclass
class Text:
    """A prompt and its answer."""

    set: str
    prompt: int  # tokens of the prompt
    tokens: list[int]  # prompt and answer
    drafts: dict[int, Draft]  # place -> what is drawn from there on, up to DEPTH candidates
    max_tokens: int  # of an answer: this bound is known in service, not where it ends
    _runs: dict[tuple[int, tuple[int, ...]], list[Run]] = field(default_factory=dict)

    def drawn(self, at: int) -> Draft:
        """DEPTH candidates and scores of the draft model behind ``tokens[:at]``."""
        tokens, scores = self.drafts.get(at, ([], []))
        missing = DEPTH - len(tokens)
        return tokens + [WRONG] * missing, scores + (scores[-1:] or [math.nan]) * missing

    def runs(self, at: int, drawn: Sequence[int] = ()) -> list[Run]:
        """What :func:`propose` finds behind ``tokens[:at]`` and the candidates ``drawn``."""
        if list(drawn) == self.tokens[at : at + len(drawn)]:
            at, drawn = at + len(drawn), ()
        key = at, tuple(drawn)
        if key not in self._runs:
            self._runs[key] = propose(SOURCES, np.array([*self.tokens[:at], *drawn], dtype=np.int64), DEPTH)
        return self._runs[key]

    def won(self, at: int, candidates: Sequence[int]) -> int:
        """Candidates that are accepted behind ``tokens[:at]``."""
        right = self.tokens[at : at + len(candidates)]
        return next((i for i, token in enumerate(right) if token != candidates[i]), len(right))

    def limit(self, at: int) -> int:
        """Candidates at most."""
        return max(min(DEPTH, self.max_tokens - (at - self.prompt) - 1), 0)


def recorded_texts(folder: Path) -> Iterator[Text]:
    """The answers of a dataset of ``vllm-specdecpp collect`` at temperature 0.

    Where all candidates of a recorded round were accepted nobody knows the draft's next one: it is right as often as
    the others of that request.

    Raises:
        ValueError: it is none, or was recorded at another temperature.
    """
    dataset = open_dataset(folder)
    sampling = dataset.manifest.sampling
    if sampling["temperature"] != 0:
        raise ValueError(f"--record {folder}: recorded at temperature {sampling['temperature']}; give one of 0")
    answers = {(row["set"], row["id"]): row for row in read_responses(folder)}
    for shard in dataset.shards():
        rounds: dict[int, list[tuple[list[int], list[float], int]]] = {}  # prompt -> candidates, scores, accepted
        ids, top1, starts = shard.token_ids.tolist(), shard.top1_prob.tolist(), shard.round_starts.tolist()
        for i, prompt in enumerate(shard.prompt_index.tolist()):
            of_round = slice(starts[i], starts[i + 1])
            rounds.setdefault(prompt, []).append((ids[of_round], top1[of_round], int(shard.num_accepted[i])))
        for prompt, its in rounds.items():
            answer = answers.get((shard.prompts[prompt]["set"], shard.prompts[prompt]["id"]))
            if answer is not None:
                tokens, before = [*answer["prompt_token_ids"], *answer["token_ids"]], len(answer["prompt_token_ids"])
                drafts = _drafts(tokens, before + 1, its, np.random.default_rng(prompt))
                yield Text(answer["set"], before, tokens, drafts, int(sampling["max_tokens"]))


def _drafts(
    tokens: list[int], at: int, rounds: Sequence[tuple[list[int], list[float], int]], rng: np.random.Generator
) -> dict[int, Draft]:  # fmt: skip
    seen = sum(min(won + 1, len(candidates)) for candidates, _, won in rounds)
    often = sum(won for *_, won in rounds) / max(seen, 1)
    begins = at + np.cumsum([0, *(won + 1 for *_, won in rounds[:-1])])
    drafts: dict[int, Draft] = {}
    for begin, (candidates, scores, won) in zip(begins[::-1].tolist(), rounds[::-1], strict=True):
        end = begin + len(candidates)
        if won == len(candidates) and end < len(tokens):
            right = bool(rng.random() < often)
            more = drafts.get(end + 1, ([], [])) if right else ([], [])
            drafts[end] = [tokens[end] if right else WRONG, *more[0]][:DEPTH], [scores[-1], *more[1]][:DEPTH]
        tail = drafts.get(end, ([], [])) if won == len(candidates) else ([], [])
        for place in range(begin, min(begin + won + 1, end)):
            mine = slice(place - begin, None)
            drafts[place] = (candidates[mine] + tail[0])[:DEPTH], (scores[mine] + tail[1])[:DEPTH]
    return drafts


def least_seconds(text: Text, setting: Setting) -> float:
    """Of all ways to emit an answer whose draft candidates and runs are known beforehand: a shortest path.

    A round drafts k candidates, lets a run of r go on behind them, and emits k + r + 1 tokens; more than will be
    accepted is never worth it where wider verifications cost no less. Reading is linear in tokens, so what a round
    without a draft emits, and a run behind one, is charged at once if another draft is still to come.
    """
    end, slope = len(text.tokens), setting.reading(1, 1)
    places = range(text.prompt + 1, end)
    right = {p: text.won(p, text.drawn(p)[0]) for p in places}
    free = {p: max((text.won(p, run.token_ids) for run in text.runs(p)), default=0) for p in places}
    verify = [setting.verify(rows) for rows in range(1, DEPTH + 2)]  # [candidates]
    drafting, over = {end: math.inf}, {end: 0.0}  # place -> seconds to the end with another draft, and without
    for at in range(end - 1, text.prompt, -1):
        limit = text.limit(at)
        ways = [(run, verify[run], min(at + run + 1, end)) for run in range(min(free[at], limit) + 1)]
        over[at] = min(cost + over[to] for _, cost, to in ways)
        drafting[at] = min(cost + slope * (to - at) + drafting[to] for _, cost, to in ways)
        for k in range(1, min(right[at], limit) + 1):
            passes = setting.first(1) + (k - 1) * setting.step(1)
            for run in range(min(free.get(at + k, 0), limit - k) + 1):
                to = min(at + k + run + 1, end)
                drafting[at] = min(drafting[at], passes + verify[k + run] + min(slope * run + drafting[to], over[to]))
    start = text.prompt + 1
    return min(over[start], slope * max(start - 2, 0) + drafting[start])
