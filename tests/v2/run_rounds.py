# SPDX-License-Identifier: Apache-2.0
"""Free runs in the oracle harness: texts that repeat themselves, and what Model Runner V1's functions take of them,
beside drafts and behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch

from tests.v2.cost_rounds import MAX_LENGTH, ScriptedPlay, attach_script, scripted
from tests.v2.oracle import STOP_TOKEN, VOCAB, predict
from vllm_specdecpp.decision.cost_aware import device_runs
from vllm_specdecpp.decision.cost_aware.drafting import CostAwareRound
from vllm_specdecpp.decision.sources import propose
from vllm_specdecpp.decision.sources.suffix import longest_match
from vllm_specdecpp.kernels.one_hot_rows import one_hot_rows_torch
from vllm_specdecpp.kernels.suffix_match import suffix_match_torch

CURVES = {"first": {1: 5e-3, 4: 7e-3}, "step": {1: 2e-3}, "verify": {1: 20e-3, 6: 20e-3, 64: 52e-3}}
"""Seconds: some rows are free, the others worth a fair chance, and drafting takes a good part of a round."""


def echo(context: Sequence[int]) -> tuple[int, float]:
    """As ``oracle.predict``, but often a token of the context, so that runs go on behind drafts."""
    token, confidence = predict(context)
    if token % 8 < 2:
        return (STOP_TOKEN if token % 8 else token), confidence
    return context[token % len(context)], confidence


class RunsPlay(ScriptedPlay):
    """Compares the runs as well, in rounds in which nobody, some or all draft.

    Args:
        runs: of rank 0's play with the same seed, for a rank that follows; None: what V1's functions take.

    Attributes:
        taken: request id -> its run, of each round begun.
        kinds: requests that drafted, that took a run, that took one behind their draft; rounds with drafts and runs
            beside them; runs accepted in part, wholly, behind which the draft model drafted.
    """

    def __init__(self, *args: Any, runs: list[dict[str, list[int]]] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stops.predict = echo
        self._given, self.taken = runs, list[dict[str, list[int]]]()
        self.kinds = dict.fromkeys(("draft", "run", "behind", "both", "cut", "whole"), 0)
        self._runs: dict[str, list[int]] = {}
        self._before: Any = None
        search = self.speculator.runs._search

        def seen(last: Any, limits: Any, tail: Any, before: Any = None) -> Any:
            found, self._before = search(last, limits, tail, before), before
            return found

        self.speculator.runs._search = seen

    def _prompt(self) -> list[int]:
        prompt = super()._prompt()
        return [*prompt, *prompt[: 1 + len(prompt) // 2]]

    def _emitted(self, tokens: list[int]) -> int:
        """Often what followed before, or some token that was there before."""
        start, match = longest_match(np.array(tokens))
        place = start if match and self.random.random() < 0.6 else int(self.random.integers(0, len(tokens)))
        return tokens[place] if self.random.random() < 0.9 else int(self.random.integers(0, VOCAB))

    def _accepted(self, request: Any) -> int:
        accepted = super()._accepted(request)
        (name,) = [name for name, mine in self.requests.items() if mine is request]
        if (run := self._runs.get(name)) and accepted > max(self._num_drafted[name], 1):
            self.kinds["whole" if accepted == self._num_drafted[name] + len(run) else "cut"] += 1
        return accepted

    def _propose(self, batch: Any, num_sampled: Any, num_rejected: Any, num_speculative_tokens: Any) -> torch.Tensor:
        handed = super()._propose(batch, num_sampled, num_rejected, num_speculative_tokens)
        self._runs, self._num_drafted = dict.fromkeys(batch.req_ids, []), dict.fromkeys(batch.req_ids, 0)
        if self._began:
            given = MAX_LENGTH if num_speculative_tokens is None else min(num_speculative_tokens, MAX_LENGTH)
            drafted = {
                name: super(RunsPlay, self)._wanted(name, given, int(n))
                for name, n in zip(batch.req_ids, num_sampled, strict=True)
            }
            self._num_drafted = {name: len(mine) for name, mine in drafted.items()}
            self._runs = self._take(batch, num_sampled, given, drafted)
            rows = sum(len(run) for name, run in self._runs.items() if not drafted[name])
            assert int(self.speculator._tail.params.base) == len(batch.req_ids) + rows
            self.taken.append(self._runs)
        return handed

    def _take(self, batch: Any, num_sampled: Any, given: int, drafted: dict[str, list[int]]) -> dict[str, list[int]]:
        """What each request's run is: request id -> tokens."""
        if self._given is not None:
            return self._given[len(self.taken)]
        limits = []
        for name, count in zip(batch.req_ids, num_sampled.tolist(), strict=True):
            request = self.requests[name]
            room = min(request.end, self.speculator.max_model_len) - 1 - len(request.tokens)
            cap = given if request.cap is None else request.cap
            limits.append(max(min(given, cap, room), 0) if count else 0)
        rule, tokens = self._rule, [np.array(self.requests[name].tokens) for name in batch.req_ids]
        stops = [list(self.requests[name].stops) for name in batch.req_ids]
        rows = zip(tokens, limits, stops, strict=True)
        runs = [propose(rule.sources, t, n, ends) if n else [] for t, n, ends in rows]
        taken = rule.free_runs.take(batch.req_ids, runs, np.array(limits), rule.costs)
        mine = [drafted[name] for name in batch.req_ids]
        drafts = np.array([bool(candidates) for candidates in mine])
        round_ = self._follow(batch.req_ids, np.array(limits), taken.without(drafts), mine, tokens, stops)
        self.truths[-1].taken = taken = round_.free
        took = taken.lengths > 0
        self.kinds["draft"] += int(drafts.sum())
        self.kinds["run"] += int((took & ~drafts).sum())
        self.kinds["behind"] += int((took & drafts).sum())
        self.kinds["both"] += bool(drafts.any() and (took & ~drafts).any())
        return {name: taken.token_ids(row) for row, name in enumerate(batch.req_ids)}

    def _follow(
        self, names: list[str], limits: Any, free: Any, drafted: list[list[int]], tokens: Any, stops: Any
    ) -> CostAwareRound:
        """Model Runner V1's round with these drafts, and the runs that go on behind them."""
        sizes = np.array([len(mine) for mine in drafted])
        round_ = CostAwareRound(self._rule, names, sizes, sizes > 0, 0.0, free=free)
        for step in range(sizes.max()):
            heads = [[*map(int, text), *mine[:step]] for text, mine in zip(tokens, drafted, strict=True)]
            round_.step(np.array([predict(head)[1] for head in heads]))
        round_.limits = limits
        runs: list[Any] = [[] for _ in names]
        for row, (mine, ends) in enumerate(zip(drafted, stops, strict=True)):
            if mine and len(mine) < limits[row] and mine[-1] not in ends:
                runs[row] = propose(self._rule.sources, np.append(tokens[row], mine), limits[row] - len(mine), ends)
        with mock.patch.object(self._rule.free_runs, "take", wraps=self._rule.free_runs.take) as take:
            round_.follow(runs, round_.reach() if sizes.any() else np.ones(len(names)))
        if sizes.any():
            assert self._before is not None
            for found, wanted in zip(self._before, take.call_args.args[4], strict=True):
                np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4)
        return round_

    def _wanted(self, name: str, bound: int, num_sampled: int) -> list[int]:
        return [*super()._wanted(name, bound, num_sampled), *self._runs[name]]

    def _drawn(self, wanted: list[list[int]]) -> list[list[int]]:
        return [mine[: self._num_drafted[name]] for name, mine in zip(self._names, wanted, strict=True)]

    def _compare(self, names: list[str], *args: Any) -> None:
        self._names = names
        super()._compare(names, *args)

    def _may_be_behind(self) -> bool:
        return True


def quicker_runs(runs: Any) -> None:
    """By twins of the kernels, which have tests of their own and are slow when they are interpreted."""
    runs.match, runs.make_certain = suffix_match_torch, one_hot_rows_torch
    runs.take, runs.behind = device_runs.take_runs, device_runs.behind_drafts


def with_runs(tiny: Any, seed: int, *, leads: bool = True, **options: Any) -> tuple[Any, Any, Any]:
    """As :func:`tests.v2.cost_rounds.scripted`, with suffix runs."""
    config, speculator, _ = scripted(tiny, seed, sources=["suffix", "draft_model"], **options)
    speculator.model.predict = echo
    quicker_runs(speculator.runs)
    rule = attach_script(speculator, seed, leads=leads, **CURVES)
    if rule is not None:
        rule.chance = 0.5
    return config, speculator, rule
