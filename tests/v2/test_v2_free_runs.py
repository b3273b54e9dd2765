# SPDX-License-Identifier: Apache-2.0
"""Free runs on V2: those that V1 takes, in rounds that draft and rounds that do not; and the draft's KV behind them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.planted_bugs import Bugs, after, change_arguments, change_result
from tests.v2.cost_rounds import late_copies
from tests.v2.run_rounds import RunsPlay, with_runs


@pytest.mark.parametrize(("late", "books"), [(0, False), (1, False), (2, True)])
def test_runs_are_those_of_v1_and_drafts_right_behind_them(tiny, monkeypatch, late, books):
    """As requests join, are read in chunks, share cached blocks, are preempted, leave; the host learns late."""
    late_copies(monkeypatch, late)
    config, speculator, rule = with_runs(tiny, seed=late)
    play = RunsPlay(speculator, config, seed=30 + late, books=books, caches=True)
    play.run(num_steps=80)
    assert min(play.kinds.values()) >= 2 and play.kinds["both"] >= 5, play.kinds
    assert play.num_left_out >= 5 and play.num_caught_up >= 5
    assert len(rule.plans) - 1 - late <= len(rule.told) == play.num_checked
    known = rule.free_runs
    assert known.candidates["suffix"] > known.accepted["suffix"] > 0


MUTATIONS = Bugs()
"""Each is given pytest's monkeypatch and a speculator."""
mutation = MUTATIONS.named


def _matched(monkeypatch: Any, s: Any, change: Callable[..., Any]) -> None:
    """The match is given ``change(tokens, states, last)`` in place of these."""
    change_arguments(monkeypatch, s.runs, "match", lambda *args: (*change(*args[:3]), *args[3:]))


@mutation("a run begins one token late")
def _(monkeypatch, s):
    original = s.runs.match

    def match(*args: Any, starts: torch.Tensor, matches: torch.Tensor) -> None:
        original(*args, starts=starts, matches=matches)
        starts.add_((matches > 0) & (starts > 1))

    s.runs.match = match


@mutation("runs of other requests")
def _(monkeypatch, s):
    _matched(monkeypatch, s, lambda tokens, states, last: (tokens, states.roll(1), last))


@mutation("the newest token is not looked at")
def _(monkeypatch, s):
    _matched(monkeypatch, s, lambda tokens, states, last: (tokens, states, last - 1))


@mutation("what was rejected, or another's before, is looked at")
def _(monkeypatch, s):
    _matched(monkeypatch, s, lambda tokens, states, last: (tokens, states, last + 1))


@mutation("runs go beyond their limit")
def _(monkeypatch, s):
    change_arguments(monkeypatch, s.runs, "take", lambda *args: (*args[:5], args[5] + 1, *args[6:]))


@mutation("a request that drafts takes a run beside its draft")
def _(monkeypatch, s):
    drafts_nothing = lambda tail: SimpleNamespace(params=tail.params, drafts=torch.zeros_like(tail.drafts))  # noqa: E731
    change_arguments(monkeypatch, s.runs, "find", lambda batch, tail: (batch, drafts_nothing(tail)))


@mutation("last round's runs are submitted again")
def _(monkeypatch, s):
    original = s.runs.find

    def find(batch: Any, tail: Any) -> None:
        kept = s.runs._candidates.clone()
        original(batch, tail)
        s.runs._candidates.copy_(kept)

    s.runs.find = find


@mutation("runs are no rows of the verification")
def _(monkeypatch, s):
    after(monkeypatch, s.runs, "find", lambda batch, tail: tail.params.base.fill_(batch.num_reqs))


@mutation("matches of other rows are reported")
def _(monkeypatch, s):
    def swapped(columns: list[torch.Tensor]) -> list[torch.Tensor]:
        columns[1] = columns[1].flip(0)
        return columns

    change_result(monkeypatch, s.runs, "report", swapped)


def _joined(monkeypatch: Any, s: Any, joined: Callable[..., Any]) -> None:
    """``joined(taken, others, drafts)`` in place of what was taken behind the drafts as well."""

    def changed(taken: Any, *_: Any) -> Any:
        taken.joined = functools.partial(joined, taken)
        return taken

    change_result(monkeypatch, s.cost_aware.rule.free_runs, "reported", changed)


@mutation("what drafters leave counts as taken")
def _(monkeypatch, s):
    _joined(monkeypatch, s, lambda taken, *_: taken)


@mutation("nothing is learnt of runs behind drafts")
def _(monkeypatch, s):
    _joined(monkeypatch, s, lambda taken, others, drafts: taken.without(drafts))


def _followed(s: Any, change: Callable[..., None]) -> None:
    """``change(last, limits, before)`` in place, before the search behind the drafts."""
    original = s.runs._search

    def search(last: Any, limits: Any, tail: Any, before: Any = None) -> Any:
        if before is not None:
            change(last, limits, before)
        return original(last, limits, tail, before)

    s.runs._search = search


@mutation("a run behind a draft goes on from the candidate before")
def _(monkeypatch, s):
    _followed(s, lambda last, limits, before: last.sub_((limits > 0).long()))


@mutation("nobody knows how likely the draft is")
def _(monkeypatch, s):
    _followed(s, lambda last, limits, before: before.survival.fill_(1.0))


@mutation("what the drafts bring is left out")
def _(monkeypatch, s):
    _followed(s, lambda last, limits, before: before.tokens.sub_(s._tail.expected.sum()))


@mutation("the rows of drafts are left out")
def _(monkeypatch, s):
    _followed(s, lambda last, limits, before: before.rows.sub_(s.round.lengths.sum()))


@mutation("the time of drafting is left out")
def _(monkeypatch, s):
    _followed(s, lambda last, limits, before: before.seconds.zero_())


@mutation("the first pass is taken to cost nothing")
def _(monkeypatch, s):
    _followed(s, lambda last, limits, before: before.seconds.sub_(s._tail.params.first_seconds[s._tail.widths[0]]))


@mutation("a run goes on behind a stop token")
def _(monkeypatch, s):
    def change(last: Any, limits: Any, before: Any) -> None:
        rows = slice(len(last))
        room = s.round.max_lengths[rows] - s.round.lengths[rows]
        limits.copy_(torch.where(s._tail.drafts[rows] > 0, room, limits))

    _followed(s, change)


@mutation("a draft's first candidate is not among the tokens")
def _(monkeypatch, s):
    original = s.runs.follow

    def follow(tail: Any) -> None:
        drafted = s.round.draft_tokens.clone()
        s.round.draft_tokens[:, 0] = torch.where(drafted[:, 0] >= 0, 1, -1)
        original(tail)
        s.round.draft_tokens.copy_(drafted)

    s.runs.follow = follow


@mutation("the run is put over the draft")
def _(monkeypatch, s):
    original = s.runs.submit

    def submit() -> None:
        rows, lengths = s.runs._candidates, s.round.lengths
        for row, length in enumerate(lengths.tolist()):
            if length and (rows[row] >= 0).any():
                rows[row] = torch.cat((rows[row, length:], rows[row, :length]))
        original()

    s.runs.submit = submit


@mutation("runs behind drafts leave no gap")
def _(monkeypatch, s):
    drafted: list[torch.Tensor] = []

    def remember(batch: Any, num_sampled: Any) -> None:
        drafted[:] = [s.submitted[batch.idx_mapping] - s.runs._last_ran]

    after(monkeypatch, s.runs, "verified", remember)
    change_result(monkeypatch, s.runs, "has_gap", lambda gaps, batch: gaps & (drafted[0] == 0))


@mutation("a candidate that was drawn and never fed back counts as read")
def _(monkeypatch, s):
    def forget(batch: Any, num_sampled: Any) -> None:
        s.runs._num_sampled = num_sampled - (s.submitted[batch.idx_mapping] > s.runs._last_ran).int()

    after(monkeypatch, s.runs, "verified", forget)


@mutation("the host thinks that nobody has taken a run")
def _(monkeypatch, s):
    s.log.ran = lambda: dict.fromkeys(s.requests._rows, (0, 0))


@mutation("what a run skipped counts as read")
def _(monkeypatch, s):
    s.gaps.have_gaps = lambda *args: None


@mutation("the host thinks that nobody has skipped anything")
def _(monkeypatch, s):
    original = s.gaps.have_gaps

    def have_gaps(*args: Any) -> None:
        before = dict(s.gaps._behind)
        original(*args)
        s.gaps._behind = before

    s.gaps.have_gaps = have_gaps


@mutation("a run is not remembered until it is verified")
def _(monkeypatch, s):
    after(monkeypatch, s.runs, "submit", lambda: s.runs._ran.zero_())


@mutation("runs of which two tokens were accepted leave no gap")
def _(monkeypatch, s):
    change_arguments(monkeypatch, s.runs, "verified", lambda batch, num_sampled: (batch, num_sampled - 1))


def _play(tiny: Any, monkeypatch: Any, plant: Any) -> RunsPlay:
    config, speculator, rule = with_runs(tiny, seed=7)
    rule.drafted = 1.0  # a round without a pass would have what a run skipped read again
    if plant is not None:
        plant(monkeypatch, speculator)
    play = RunsPlay(speculator, config, seed=3)
    play.caps, play.joins = [None], 0.05  # prompts are rare, so most first passes are short
    play.accepts = 0.9  # so what the draft model has not read is often accepted
    play.run(num_steps=120)
    return play


def test_without_a_bug_all_is_well(tiny, monkeypatch):
    assert min(_play(tiny, monkeypatch, None).kinds.values()) >= 2


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_play_notices(tiny, monkeypatch, name):
    with pytest.raises((AssertionError, IndexError)):
        _play(tiny, monkeypatch, MUTATIONS[name])
