# SPDX-License-Identifier: Apache-2.0
"""Serves requests round by round, with true costs: whose prompts the draft model reads and when, who waits, who ends.

Seconds are the true costs without noise; what a rule observes of them is noisy (5 %, and 1 % spikes). The target's
prefill is the same whatever a rule does, so it counts in a served mix only, where requests wait for it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.simulate.settings import SPELL, Setting
from benchmarks.simulate.streams import DEPTH, Array, Counts, Stream
from vllm_specdecpp.decision.cost_aware.admission import Standing


class Round(Protocol):
    """A drafting phase, as :class:`CostAwareRound`."""

    running: NDArray[np.bool_]  # [num_reqs]
    lengths: Counts  # [num_reqs] candidates submitted
    drafts: NDArray[np.bool_]  # [num_reqs] chosen to draft
    widths: list[int]  # requests in each pass so far

    @property
    def trial(self) -> bool:
        """Whether somebody drafts that is not expected to gain by it."""

    def step(self, scores: Array | None) -> Any:
        """A draft pass has shown these [num_reqs] scores."""


class Rule(Protocol):
    """What the simulator plays."""

    lag: int

    def begin(self, standings: Sequence[Standing]) -> Round:
        """Choose who drafts."""

    def finish(
        self, round_: Any, verified: Sequence[int | None], accepted: Sequence[int], draft_seconds: float | None,
        verify_seconds: float | None, read: Sequence[int],
    ) -> None:  # fmt: skip
        """Learn from a verified round; None is what could not be observed."""


@dataclass
class Run:
    """What became of it."""

    tokens: list[int] = field(default_factory=lambda: [0])  # [num_rounds + 1] emitted so far
    seconds: list[float] = field(default_factory=lambda: [0.0])  # [num_rounds + 1]
    trials: list[tuple[int, float, int]] = field(default_factory=list)  # tokens before, seconds, tokens of such a round
    first_draft: int | None = None  # round
    drafted: int = 0  # candidates
    rule_seconds: float = 0.0  # the rule's own processor time
    requests: list[float] = field(default_factory=list)  # seconds of each that ended
    to_first: list[float] = field(default_factory=list)  # of a served mix: seconds from arrival to the first token
    per_token: list[tuple[int, float, int]] = field(default_factory=list)  # before it, seconds, its tokens

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens[-1] / self.seconds[-1]

    def at(self, tokens: Sequence[float] | Array) -> Array:
        """Seconds until so many tokens were out."""
        return np.interp(tokens, self.tokens, self.seconds)


@dataclass(slots=True)
class _Place:
    """A request that is being served."""

    at: int
    end: int
    start: int
    request_id: str
    behind: int
    since: float
    before: int
    where: int
    number: int


class Server:
    """Serves ``tokens`` of some streams.

    Args:
        setting: true costs.
        streams: one for each place in the batch: when a request ends the next of its stream begins at once. For a
            served mix one stream, whose requests take whatever place is free.
        tokens: to emit; a stream that is at its end begins anew.
        reads: False: the draft model knows every prompt, and all that was emitted, for nothing.
    """

    def __init__(self, setting: Setting, streams: Sequence[Stream], tokens: int, reads: bool = True) -> None:
        self.setting, self.tokens, self.streams, self.reads = setting, tokens, streams, reads
        self.scores = np.concatenate([s.scores for s in streams])  # [num_positions, DEPTH]
        self.run: list[int] = np.concatenate([s.run for s in streams]).tolist()
        base = np.cumsum([0, *(len(s) for s in streams)]).tolist()
        # Of each place: first position of its requests, and the end.
        self.starts = [[b + int(p) for p in s.starts] for b, s in zip(base, streams, strict=False)]
        self.prompts = [s.prompt_tokens.tolist() for s in streams]
        self.max_tokens = max(s.max_tokens for s in streams)
        self.verify = [0.0, *(setting.verify(n) for n in range(1, setting.batch * (DEPTH + 1) + 1))]

    def _begin(self, name: str, place: int, number: int, since: float) -> _Place:
        lap, index = divmod(number, len(self.prompts[place]))
        start, end = self.starts[place][index : index + 2]
        name = f"{name}{place}-{lap}-{index}"
        behind = self.prompts[place][index] - 1 if self.reads else 0
        return _Place(start, end, start, name, behind, since, 0, place, number)

    def play(self, rule: Rule, seed: int, arrivals: Sequence[float] | None = None, name: str = "") -> Run:
        """Serve all by one rule.

        Args:
            rule: goes on learning.
            seed: of the noise in what it observes.
            arrivals: of a served mix: seconds at which each request arrives.
            name: before the requests' ids; another one for each time that a rule serves.
        """
        rng = np.random.default_rng(seed)
        setting, run, now, tokens, number = self.setting, Run(), 0.0, 0, 0
        active: list[_Place] = []
        if arrivals is None:
            active = [self._begin(name, place, 0, 0.0) for place in range(len(self.streams))]
        num_rounds = 0
        while tokens < self.tokens:
            if arrivals is not None and not active:
                if number == len(arrivals):
                    break
                now = max(now, arrivals[number])
            round_ = self._draft(rule, active, run) if active else None
            widths = list(round_.widths) if round_ is not None else []
            lengths: list[int] = round_.lengths.tolist() if round_ is not None else []
            read = 0
            if round_ is not None and widths:
                for place, drafts in zip(active, round_.drafts.tolist(), strict=True):
                    if drafts:
                        read, place.behind = read + place.behind, -1  # -1: it drafted
                run.first_draft = num_rounds if run.first_draft is None else run.first_draft
                run.drafted += sum(lengths)
            draft_seconds = setting.draft(widths, read)
            verify_seconds = self.verify[len(active) + sum(lengths)] if active else 0.0
            new: list[_Place] = []
            while arrivals is not None and number < len(arrivals) and len(active) + len(new) < setting.batch:
                if arrivals[number] > now + draft_seconds:
                    break
                new.append(self._begin(name, 0, number, arrivals[number]))
                number += 1
            if new:
                prompt = sum(self.prompts[0][place.number % len(self.prompts[0])] for place in new)
                verify_seconds = max(verify_seconds, self.verify[1]) + setting.prefill(prompt)
            now += draft_seconds + verify_seconds
            before, stay, joined = tokens, [], False
            verified: list[int | None] = []
            accepted: list[int] = []
            for place, length in zip(active, lengths, strict=True):
                won = min(self.run[place.at], length)
                place.at += won + 1
                tokens += won + 1
                place.behind = 0 if place.behind < 0 or not self.reads else place.behind + 1
                accepted.append(won)
                verified.append(length if place.at < place.end else None)
                if place.at < place.end:
                    stay.append(place)
                elif arrivals is None:
                    run.requests.append(now - place.since)
                    stay.append(self._begin(name, place.where, place.number + 1, now))
                    joined = True
                else:
                    run.per_token.append((place.before, now - place.since, place.end - place.start))
            for place in new:
                run.to_first.append(now - place.since)
                place.since, place.before = now, tokens
            active = stay + new
            if round_ is not None:
                passes = [widths[0] + read] if read else []
                noise = np.exp(rng.normal(0, 0.05, 2)) * np.where(rng.random(2) < 0.01, 8, 1)
                noise *= setting.busy if int(now / SPELL) % 2 else 1.0
                clean = None if joined or new else verify_seconds * float(noise[1])
                clock = time.thread_time()
                rule.finish(round_, verified, accepted, draft_seconds * float(noise[0]), clean, passes)
                run.rule_seconds += time.thread_time() - clock
                num_rounds += 1
                if widths and round_.trial:
                    run.trials.append((before, draft_seconds + verify_seconds, tokens - before))
            run.tokens.append(tokens)
            run.seconds.append(now)
        return run

    def _draft(self, rule: Rule, active: list[_Place], run: Run) -> Round:
        standings = []
        for place in active:
            emitted = 1 + place.at - place.start
            room = max(self.max_tokens - emitted - 1, 0)
            standings.append(Standing(place.request_id, min(room, DEPTH), room, place.behind, emitted))
        clock = time.thread_time()
        round_ = rule.begin(standings)
        if round_.running.any():
            scores = self.scores[[place.at for place in active]]  # [num_reqs, DEPTH]
            while round_.running.any():
                drawn = len(round_.widths)
                round_.step(scores[:, drawn - rule.lag] if drawn >= rule.lag else None)
        run.rule_seconds += time.thread_time() - clock
        return round_

    def planned(self, lengths: Counts) -> float:
        """Tokens per second where a round from each position has this length [num_positions], all prompts read."""
        plan: list[int] = np.minimum(lengths, self.limits()).tolist()
        ends = np.zeros(len(plan) + 1, dtype=np.bool_)
        size = len(self.streams)
        prompt_at: dict[int, int] = {}
        for starts, prompts in zip(self.starts, self.prompts, strict=True):
            ends[starts[1:]] = True
            prompt_at.update(zip(starts, prompts, strict=False))
        is_end: list[bool] = ends.tolist()
        first, last = [s[0] for s in self.starts], [s[-1] for s in self.starts]
        at, run, setting, tokens, seconds = list(first), self.run, self.setting, 0, 0.0
        known: dict[tuple[int, ...], float] = {}
        fresh = [True] * size
        while tokens < self.tokens:
            here = [plan[a] for a in at]
            key = tuple(sorted(here)) if size > 1 else (here[0],)
            if key not in known:
                widths = [sum(length > k for length in here) for k in range(max(here))]
                known[key] = setting.round(widths, size + sum(here))
            seconds += known[key]
            read = 0
            for i, length in enumerate(here):
                a = at[i]
                if fresh[i] and length:
                    read += prompt_at[a] - 1
                won = run[a]
                a += (won if won < length else length) + 1
                tokens += a - at[i]
                fresh[i] = is_end[a]
                at[i] = first[i] if a == last[i] else a
            if read and self.reads:
                seconds += setting.reading(1, read)
        return tokens / seconds

    def limits(self) -> Counts:
        """[num_positions] candidates at most."""
        if not hasattr(self, "_limits"):
            limits = np.empty(len(self.run), dtype=np.int64)
            for starts in self.starts:
                for start, end in zip(starts, starts[1:], strict=False):
                    limits[start:end] = self.max_tokens - np.arange(end - start) - 2
            self._limits = np.minimum(np.maximum(limits, 0), DEPTH)
        return self._limits
