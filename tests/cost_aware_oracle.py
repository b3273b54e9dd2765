# SPDX-License-Identifier: Apache-2.0
"""The cost-aware step in plain floats: every set of requests and every number of candidates ahead, tried one by one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

HORIZON = 6
MOST = 8.0
"""Log-odds beyond are cut off."""
FEW = 6
"""Up to so many requests all sets are tried; of more, the best 1, 2, 3, ..."""
SAME, FRAGILE = 1e-12, 1e-5
"""Gains closer than ``SAME``, relative to what they are made of, are equal: a rule says which of them counts. Those
that differ, but by less than ``FRAGILE``, float32 may not tell apart."""


@dataclass
class Step:
    """What the rule says at one step."""

    submit: list[bool]
    go_on: list[bool]
    fragile: bool


def sigmoid(y: float) -> float:
    return 1 / (1 + math.exp(-y))


def log_odds(score: float) -> float:
    """Of a score, which may be anything but NaN."""
    score = min(max(score, 0.0), 1.0)
    if score in (0.0, 1.0):
        return MOST if score else -MOST
    return min(max(math.log(score / (1 - score)), -MOST), MOST)


class Oracle:
    """A round. Step k is decided before anything is drawn at it.

    Args:
        limits: [num_reqs] candidates that each request may have.
        drafts: [num_reqs] who drafts.
        price: tokens that a second must bring; 0: all draft to their limits, and submit all.
        this, next: slope, common intercept, and one intercept a bucket, of a scored candidate's acceptance and of the
            one's after it.
        means: mean acceptance by bucket.
        bucket_of: position to bucket.
        step, verify: seconds of a draft step by requests, of a verification by tokens.
        lag: which candidate a score is of.
        free_rows: candidates that are verified without being drafted, of all requests together.
        levels: [num_reqs] what each request's record adds to its log-odds as to later candidates; None: 0.
    """

    def __init__(
        self, *, limits: Sequence[int], drafts: Sequence[bool], price: float, this: Sequence[float],
        next: Sequence[float], means: Sequence[float], bucket_of: Callable[[int], int], step: Callable[[int], float],
        verify: Callable[[int], float], lag: int = 0, free_rows: int = 0,
        levels: Sequence[float] | None = None,
    ) -> None:  # fmt: skip
        self.limits, self.price, self.lag = list(limits), price, lag
        self.this, self.next, self.means, self.bucket_of = this, next, means, bucket_of
        self.step_seconds, self.verify_seconds = step, verify
        n = len(self.limits)
        self.levels = [0.0] * n if levels is None else list(levels)
        self.base = n + free_rows
        self.running = [bool(d) for d in drafts]
        self.lengths, self.survival, self.expected = [0] * n, [1.0] * n, [0.0] * n
        self.widths: list[int] = []
        self.log: list[list[float]] = []  # per step: log-odds seen, NaN where none

    def step(self, scores: Sequence[float] | None) -> Step:
        """Decide about candidate k and k + 1; ``scores`` [num_reqs] as the kernel's, None: nothing is scored."""
        k = len(self.widths) + 1
        position = k - self.lag
        ran = [i for i, runs in enumerate(self.running) if runs]
        self.widths.append(len(ran))
        self.log.append([math.nan] * len(self.limits))
        reach: dict[int, float] = {}  # P(candidate k and all before it are accepted)
        worth: dict[int, list[float]] = {}  # tokens that 0, 1, 2, ... more candidates bring
        for i in ran:
            x = None
            if scores is not None and position > 0 and not math.isnan(scores[i]):
                x = self.log[-1][i] = log_odds(scores[i])
            if position > 0:
                self.survival[i] *= self._accept(x, position)
            ahead = self._following(x, position, HORIZON + self.lag, self.levels[i])
            reach[i] = self.survival[i] * (ahead.pop(0) if self.lag else 1.0)
            chain = [reach[i] * a for a in itertools.accumulate(ahead, lambda a, b: a * b)]
            worth[i] = [sum(chain[: min(m, self._room(i))]) for m in range(HORIZON + 1)]
        chosen, close = self._go_on(ran, reach, worth)
        submit, also_close = self._submit([i for i in ran if i not in chosen], chosen, reach)
        if not self.price:
            chosen, submit, close, also_close = {i for i in ran if self._room(i) > 0}, set(ran), False, False
        for i in submit:
            self.lengths[i] += 1
            self.expected[i] += reach[i]
        every = range(len(self.limits))
        self.running = [i in chosen for i in every]
        return Step([i in submit for i in every], list(self.running), close or also_close)

    def end(self, ended: Iterable[Any]) -> None:
        """Requests whose draft ended with the candidate just drawn."""
        self.running = [runs and not ends for runs, ends in zip(self.running, ended, strict=True)]

    def _room(self, i: int) -> int:
        return max(self.limits[i] - self.lengths[i] - 1, 0)

    def _accept(self, x: float | None, position: int) -> float:
        bucket = self.bucket_of(position)
        if x is None:
            return self.means[bucket]
        return sigmoid(self.this[0] * x + self.this[1] + self.this[2 + bucket])

    def _following(self, x: float | None, position: int, num: int, level: float) -> list[float]:
        """Acceptance of the candidates after the one at ``position``: the next one's, then of the score that would have
        meant as much, were it the next one's own, and so on."""
        found = []
        for at in range(position, position + num):
            here, after = self.bucket_of(at), self.bucket_of(at + 1)
            if x is None:
                found.append(self.means[after])
                continue
            y = self.next[0] * (x + level) + self.next[1] + self.next[2 + here]
            found.append(sigmoid(y))
            x = min(max((y - self.this[1] - self.this[2 + after]) / max(self.this[0], 0.1), -MOST), MOST)
        return found

    def _go_on(self, ran: list[int], reach: dict[int, float], worth: dict[int, list[float]]) -> tuple[set[int], bool]:
        """Who draws another candidate, and whether float32 may see it otherwise."""
        tokens = self.base + sum(self.lengths) + len(ran)
        options = [self._option((), 0.0, 0, 0.0, tokens, tokens)]
        for m in range(1, max((self._room(i) for i in ran), default=0) + 1):
            for members in _sets(ran, {i: worth[i][m] for i in ran}) if m <= HORIZON else ():
                value, seconds = sum(worth[i][m] for i in members), m * self.step_seconds(len(members))
                options.append(self._option(members, value, m, seconds, tokens, tokens + len(members) * m))
        best, close = _best(options)
        return {i for i in best.members if self._room(i) > 0}, close

    def _submit(self, stops: list[int], chosen: set[int], reach: dict[int, float]) -> tuple[set[int], bool]:
        """Whose candidate k is worth its row, besides those who go on; and whether float32 may see it otherwise."""
        tokens = self.base + sum(self.lengths) + len(chosen)
        options = [self._option((), 0.0, 0, 0.0, tokens, tokens)]
        for members in _sets(stops, reach):
            value = sum(reach[i] for i in members)
            options.append(self._option(members, value, 0, 0.0, tokens, tokens + len(members)))
        best, close = _best(options)
        return chosen | set(best.members), close

    def _option(
        self, members: tuple[int, ...], value: float, ahead: int, draft_seconds: float, tokens: int, then: int
    ) -> Option:
        """A set's ``value`` in tokens, for drafting and for verifying ``then`` instead of ``tokens``."""
        before, after = self.verify_seconds(tokens), self.verify_seconds(then)
        terms = value, self.price * (draft_seconds + after), self.price * before
        return Option(members, terms[0] - terms[1] + terms[2], sum(map(abs, terms)), ahead)


@dataclass(frozen=True)
class Option:
    """A set of requests, and what choosing it gains."""

    members: tuple[int, ...]
    gain: float
    size: float
    """Of the terms that the gain is made of."""
    ahead: int


def _sets(ran: list[int], value: dict[int, float]) -> Iterable[tuple[int, ...]]:
    """Sets of requests, none empty."""
    best = sorted(ran, key=lambda i: (-value[i], i))
    for count in range(1, len(ran) + 1):
        if len(ran) <= FEW:
            yield from itertools.combinations(ran, count)
        else:
            yield tuple(sorted(best[:count]))


def _best(options: list[Option]) -> tuple[Option, bool]:
    """The option that gains most, and whether another one is about as good. Of equals the largest set counts, then the
    fewest candidates ahead, then the first requests."""
    top = max(options, key=lambda option: option.gain)
    scale = max(option.size for option in options)
    equal = [option for option in options if top.gain - option.gain <= SAME * scale]
    best = min(equal, key=lambda option: (-len(option.members), option.ahead, option.members))
    near = [o for o in options if o not in equal and top.gain - o.gain <= FRAGILE * max(o.size, top.size)]
    return best, any(option.members != best.members for option in near)
