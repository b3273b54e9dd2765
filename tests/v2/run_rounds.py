# SPDX-License-Identifier: Apache-2.0
"""Free runs in the oracle harness: texts that repeat themselves, and what Model Runner V1's functions take of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.v2.cost_rounds import MAX_LENGTH, ScriptedPlay, attach_script, scripted
from tests.v2.oracle import VOCAB
from vllm_specdecpp.decision.sources import propose
from vllm_specdecpp.decision.sources.suffix import longest_match
from vllm_specdecpp.kernels.one_hot_rows import one_hot_rows_torch
from vllm_specdecpp.kernels.suffix_match import suffix_match_torch

VERIFY = {1: 20e-3, 6: 20e-3, 64: 60e-3}
"""Seconds: some rows are free, the others worth a good chance."""


class RunsPlay(ScriptedPlay):
    """Compares the runs as well, in rounds in which nobody, some or all draft.

    Args:
        runs: of rank 0's play with the same seed, for a rank that follows; None: what V1's functions take.

    Attributes:
        taken: request id -> its run, of each round begun.
        kinds: requests that drafted, that took a run, rounds with both; runs accepted in part, wholly, behind which
            the draft model drafted.
    """

    def __init__(self, *args: Any, runs: list[dict[str, list[int]]] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._given, self.taken = runs, list[dict[str, list[int]]]()
        self.kinds = dict.fromkeys(("draft", "run", "both", "cut", "whole"), 0)
        self._runs: dict[str, list[int]] = {}

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
        if accepted >= 2 and self._runs.get(name):
            self.kinds["whole" if accepted == len(self._runs[name]) else "cut"] += 1
        return accepted

    def _propose(self, batch: Any, num_sampled: Any, num_rejected: Any, num_speculative_tokens: Any) -> torch.Tensor:
        handed = super()._propose(batch, num_sampled, num_rejected, num_speculative_tokens)
        self._runs = dict.fromkeys(batch.req_ids, [])
        if self._began:
            self._runs = self._take(batch, num_sampled, num_speculative_tokens)
            rows = sum(map(len, self._runs.values()))
            assert int(self.speculator._tail.params.base) == len(batch.req_ids) + rows
            self.taken.append(self._runs)
        return handed

    def _take(self, batch: Any, num_sampled: Any, num_speculative_tokens: Any) -> dict[str, list[int]]:
        """What each request's run is: request id -> tokens."""
        if self._given is not None:
            return self._given[len(self.taken)]
        limits = []
        given = MAX_LENGTH if num_speculative_tokens is None else min(num_speculative_tokens, MAX_LENGTH)
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
        plan = self.truths[-1].plan
        drafts = np.array([min(plan[name], limit) > 0 for name, limit in zip(batch.req_ids, limits, strict=True)])
        taken = taken.without(drafts)
        self.truths[-1].taken = taken
        self.kinds["draft"] += int(drafts.sum())
        self.kinds["run"] += int((taken.lengths > 0).sum())
        self.kinds["both"] += bool(drafts.any() and taken.lengths.any())
        return {name: taken.token_ids(row) for row, name in enumerate(batch.req_ids)}

    def _wanted(self, name: str, bound: int, num_sampled: int) -> list[int]:
        return self._runs[name] or super()._wanted(name, bound, num_sampled)

    def _drawn(self, wanted: list[list[int]]) -> list[list[int]]:
        runs = [self._runs[name] for name in self._names]
        return [[] if run else mine for run, mine in zip(runs, wanted, strict=True)]

    def _compare(self, names: list[str], *args: Any) -> None:
        self._names = names
        super()._compare(names, *args)

    def _may_be_behind(self) -> bool:
        return True


def with_runs(tiny: Any, seed: int, *, leads: bool = True, **options: Any) -> tuple[Any, Any, Any]:
    """As :func:`tests.v2.cost_rounds.scripted`, with suffix runs."""
    config, speculator, _ = scripted(tiny, seed, sources=["suffix", "draft_model"], **options)
    # Quicker than the interpreted kernels, which have tests of their own.
    speculator.runs.match, speculator.runs.make_certain = suffix_match_torch, one_hot_rows_torch
    rule = attach_script(speculator, seed, leads=leads, verify=VERIFY)
    if rule is not None:
        rule.chance = 0.5
    return config, speculator, rule
