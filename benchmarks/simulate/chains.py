# SPDX-License-Identifier: Apache-2.0
"""Rules that draft, take runs, or both, for one request at a time; what they play is :mod:`.texts`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from benchmarks.simulate.settings import SETTINGS, Setting, true_costs
from benchmarks.simulate.streams import DEPTH
from benchmarks.simulate.texts import SOURCES, Text
from vllm_specdecpp.costs.model import CostModel
from vllm_specdecpp.decision.cost_aware.acceptance import AcceptanceModel
from vllm_specdecpp.decision.cost_aware.admission import _SHARE, Admitted
from vllm_specdecpp.decision.cost_aware.drafting import CostAwareRound
from vllm_specdecpp.decision.cost_aware.free_runs import Taken
from vllm_specdecpp.decision.cost_aware.logistic import OnlineLogistic, logit, logit_one
from vllm_specdecpp.decision.cost_aware.rule import CostAwareRule, Standing
from vllm_specdecpp.decision.sources import Run

NOISE = 0.05
"""Of observed times, as a share."""


@dataclass
class Place:
    """Where a request stands."""

    text: Text
    name: str
    at: int  # tokens of prompt and answer so far
    behind: int = 0  # tokens that the draft model would have to read beyond the usual two


class Policy(Protocol):
    """What the simulator plays."""

    def begin(self, place: Place) -> tuple[list[int], int]:
        """Candidates, and draft passes."""

    def end(self, place: Place, num: int, won: int, ends: bool, times: tuple[float, float]) -> None:
        """Of ``num`` candidates so many were accepted; seconds of the drafting and of the rest."""


class Ngram:
    """vLLM's `ngram` (``vllm.v1.spec_decode.ngram_proposer``); off with ``longest`` 0."""

    def __init__(self, num: int = 8, shortest: int = 2, longest: int = 5) -> None:
        self.num, self.sizes = num, range(longest, shortest - 1, -1) if longest else range(0)

    def begin(self, place: Place) -> tuple[list[int], int]:
        """See :class:`Policy`."""
        tokens = np.array(place.text.tokens[: place.at])
        for size in self.sizes:
            if len(tokens) > size:
                windows = np.lib.stride_tricks.sliding_window_view(tokens[:-1], size)
                found = (windows == tokens[-size:]).all(axis=1).argmax()
                if (windows[found] == tokens[-size:]).all():
                    return tokens[found + size :][: min(self.num, place.text.limit(place.at))].tolist(), 0
        return [], 0

    def end(self, *_: object) -> None:
        """Learns nothing."""


class Ours:
    """The cost-aware rule, as the engine plays it; ``chains``: runs go on behind drafts, and end them."""

    def __init__(self, costs: CostModel, runs: bool = True, drafts: bool = True, chains: bool = True) -> None:
        self.rule = CostAwareRule(costs, DEPTH, sources=SOURCES if runs else (), drafts=drafts)
        self.chains = chains and runs
        self.round: CostAwareRound

    def begin(self, place: Place) -> tuple[list[int], int]:
        """See :class:`Policy`."""
        text, at = place.text, place.at
        room = max(text.max_tokens - (at - text.prompt) - 1, 0)
        standing = Standing(place.name, text.limit(at), room, place.behind, at - text.prompt)
        self.round = self.rule.begin([standing], [text.runs(at)] if self.rule.sources else ())
        drawn = self.draw(place)
        if self.chains and self.round.drafts[0]:
            self.round.follow([text.runs(at, drawn)], self.round.reach())
        return drawn + self.round.free.token_ids(0), len(self.round.widths)

    def draw(self, place: Place) -> list[int]:
        """Play the steps of the round: the candidates that are drafted."""
        round_, (tokens, scores) = self.round, place.text.drawn(place.at)
        while round_.running[0]:
            round_.step(np.array([scores[len(round_.widths)]]))
            drawn = tokens[: round_.lengths[0]]
            if self.chains and round_.running[0]:
                front, after = (float(x[0]) for x in round_.standing())
                round_.end(np.array([round_.outrun(0, place.text.runs(place.at, drawn), front, after, 1)]))
        return tokens[: round_.lengths[0]]

    def end(self, place: Place, num: int, won: int, ends: bool, times: tuple[float, float]) -> None:
        """See :class:`Policy`."""
        read = [2 + place.behind] if place.behind and self.round.widths else []
        self.rule.finish(self.round, [None if ends else num], [won], times[0], None if ends else times[1], read)


class Informed(Ours):
    """Knows costs, calibration and rates.

    Args:
        others: requests that it is calibrated on.
    """

    def __init__(self, others: Sequence[Text]) -> None:
        super().__init__(true_costs(SETTINGS["paper"]))
        self.rule.acceptance = AcceptanceModel(memory=1e9)
        self.rule.free_runs.models = {s.name: OnlineLogistic(*s.start, memory=1e9) for s in SOURCES}
        self.price = 0.0  # tokens that a second must bring
        self.drafts = True
        for number, text in enumerate(others):
            for drafts in (True, False):
                place = Place(text, f"other{number}", text.prompt + 1)
                while place.at < len(text.tokens):
                    limit, runs = text.limit(place.at), text.runs(place.at)
                    self._open(place, drafts, 0.0, None if drafts or not runs else runs[0], limit)
                    candidates = self.draw(place) + self.round.free.token_ids(0)
                    won = text.won(place.at, candidates)
                    self.rule.finish(self.round, [len(candidates)], [won])
                    place.at += won + 1
        self.rule.adapt = False

    def _open(self, place: Place, drafts: bool, price: float, run: Run | None, rows: int) -> None:
        """Begin a round."""
        mean, _ = self.rule.admission.records.of([place.name])
        levels = _SHARE * (logit(mean) - logit_one(self.rule.admission.records.usual(False)))
        who, limits = np.array([drafts]), np.array([place.text.limit(place.at)])
        admitted = Admitted(who, price, price, levels=levels)
        taken = None if run is None else Taken([run], np.array([min(rows, len(run.token_ids))]), np.zeros(1))
        self.round = CostAwareRound(self.rule, [place.name], limits, who, price, admitted, taken)

    def _best(
        self, place: Place, runs: Sequence[Run], limit: int, price: float, survival: float = 1.0, before: int = 1
    ) -> tuple[Run | None, int, float]:
        """The best run and length behind ``before`` rows, and the tokens that it brings beyond its price."""
        best: tuple[Run | None, int, float] = None, 0, 0.0
        for run in runs:
            reach = survival * np.cumprod(self.rule.free_runs.chances(run, place.name)[:limit])
            rows = self.rule.costs.verify.many(np.arange(before, before + len(reach) + 1))
            worth = np.concatenate([[0.0], reach.cumsum()]) - price * (rows - rows[0])
            if worth.max() > best[2]:
                best = run, int(worth.argmax()), float(worth.max())
        return best

    def begin(self, place: Place) -> tuple[list[int], int]:
        """See :class:`Policy`."""
        text, at = place.text, place.at
        price, limit, runs = self.price, text.limit(at), text.runs(at)
        run, rows, worth = self._best(place, runs, limit, price)
        drafts = self.drafts and limit > 0 and self._drafting(place, runs, price) > worth
        self._open(place, drafts, price, None if drafts else run, rows)
        drawn = self.draw(place)
        if drafts:
            num, survival = len(drawn), float(self.round.survival[0])
            run, rows, _ = self._best(place, text.runs(at, drawn), limit - num, price, survival, 1 + num)
            self.round.free = Taken([run], np.array([rows]), np.zeros(1))
        return drawn + self.round.free.token_ids(0), len(self.round.widths)

    def _drafting(self, place: Place, runs: Sequence[Run], price: float) -> float:
        """Tokens that drafting brings beyond its price: the best length, or one candidate and the run behind it."""
        costs, limit = self.rule.costs, place.text.limit(place.at)
        mean, _ = self.rule.admission.records.of([place.name])
        accepted = np.cumsum(np.power(mean[0], np.arange(1, limit + 1)))
        value = accepted - price * (costs.fixed_seconds(1, limit)[1:] - costs.verify.at(1))
        found = float(value.max())
        for run in runs:
            reach = mean[0] * np.cumprod(np.append(1.0, self.rule.free_runs.chances(run, place.name)[1:limit]))
            rows = costs.verify.many(np.arange(2, 2 + len(reach))) - costs.verify.at(1)
            found = max(found, float((reach.cumsum() - price * (costs.first.at(1) + rows)).max()))
        return found


def serve(text: Text, name: str, policy: Policy, setting: Setting, rng: np.random.Generator) -> float:
    """Seconds of an answer after its first token, which is the prefill's."""
    held, seconds, place = 0, 0.0, Place(text, name, text.prompt + 1)
    while place.at < len(text.tokens):
        place.behind = max(place.at - held - 2, 0)
        candidates, passes = policy.begin(place)
        won = text.won(place.at, candidates)
        drafting = setting.draft([1] * passes, place.behind) if passes else 0.0
        rest = setting.verify(1 + len(candidates))
        seconds += drafting + rest
        if passes:
            held = place.at + min(won, passes - 1)  # the last candidate was not read
        noise = np.exp(rng.normal(0, NOISE, 2))
        ends = place.at + won + 1 >= len(text.tokens)
        policy.end(place, len(candidates), won, ends, (drafting * float(noise[0]), rest * float(noise[1])))
        place.at += won + 1
    return seconds
