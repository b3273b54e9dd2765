# SPDX-License-Identifier: Apache-2.0
"""The cost-aware rule's rounds on V2 against the oracle: who drafts, the draft's KV, and what the rule learns when."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tests.planted_bugs import Bugs, after
from tests.v2.cost_rounds import MAX_LENGTH, ScriptedPlay, late_copies, scripted
from tests.v2.oracle import Stops
from tests.v2.play import Play
from tests.v2.run_rounds import RunsPlay, with_runs
from vllm_specdecpp.engine.shared import cost_aware as shared
from vllm_specdecpp.engine.v2 import cost_aware as v2_cost_aware


@pytest.mark.parametrize(("late", "books"), [(0, False), (1, False), (2, True)])
def test_drafts_are_the_oracles_and_outcomes_their_rounds(tiny, monkeypatch, late, books):
    """Rounds in which nobody, some or all draft, as requests join, are read in chunks, are preempted, leave."""
    late_copies(monkeypatch, late)
    config, speculator, rule = scripted(tiny, seed=late)
    play = ScriptedPlay(speculator, config, seed=20 + late, books=books)
    lengths = play.run(num_steps=40)
    assert {0, 1, MAX_LENGTH} <= set(lengths)
    assert len(rule.plans) - 1 - late <= len(rule.told) == play.num_checked <= len(rule.plans) - 1
    assert sum(told.verify_seconds is not None for told in rule.told) >= 4
    assert play.num_left_out >= 6 and play.num_caught_up >= 6


@pytest.mark.parametrize("runs", [False, True])
def test_a_rank_that_follows_drafts_what_rank_0_loaded(tiny, runs):
    """It has no rule, its own scores and draws are noise, and so are the runs that it finds."""
    said: list[torch.Tensor] = []
    make: Any = with_runs if runs else scripted
    play: Any = RunsPlay if runs else ScriptedPlay
    config, leader, rule = make(tiny, seed=3)

    def say(tensor: torch.Tensor) -> torch.Tensor:
        said.append(tensor.clone())
        return tensor

    _agree_by(leader, say)
    plans: list[Any] = []

    def tell(plan: Any) -> Any:
        plans.append(plan)
        return plan

    leader._tell = tell
    first = play(leader, config, seed=9)
    first.run(num_steps=15)
    config, follower, _ = make(tiny, seed=0, leads=False)
    if runs:
        follower.runs.match = lambda *args, starts, matches: (starts.fill_(1), matches.fill_(9))
        assert first.kinds["run"] > 5
    answers = iter(said)
    _agree_by(follower, lambda tensor: next(answers).clone())
    told = iter(plans)
    follower._tell = lambda plan: next(told)
    observe = follower.round.observe_pass
    follower.round.observe_pass = lambda k, logits, h: observe(k, torch.randn_like(logits), h)
    given = {"runs": first.taken} if runs else {}
    second = play(follower, config, seed=9, plans=rule.plans, **given)
    second.run(num_steps=15)
    assert second.lengths == first.lengths and next(answers, None) is next(told, None) is None
    assert len(set(first.lengths)) >= 4


def _agree_by(speculator: Any, agree: Any) -> None:
    speculator.agree = speculator.round.agree_drawn = speculator.cost_aware._agree = agree


def test_until_its_costs_are_known_it_drafts_as_far_as_it_may(tiny):
    """So that vLLM's warm-up runs what later rounds run."""
    config, speculator, _ = scripted(tiny, seed=1)
    speculator.cost_aware = None
    lengths = Play(speculator, config, Stops(2.0), seed=8).run(num_steps=6)
    assert max(lengths) == MAX_LENGTH


@pytest.mark.parametrize("fails", ["begin", "finish"])
def test_a_rule_that_fails_ends_drafting_and_nothing_else(tiny, monkeypatch, fails):
    config, speculator, rule = scripted(tiny, seed=5)
    costs, errors = speculator.cost_aware, []
    monkeypatch.setattr(shared.logger, "exception", lambda *said: errors.append(said))
    begin_round, takes_runs = costs.begin_round, []

    def planned(names: list[str], *args: Any) -> Any:
        num, plan = len(rule.plans), begin_round(names, *args)
        if len(rule.plans) == num:
            rule.plans.append(dict.fromkeys(names, 0))
        takes_runs.append(plan.takes_runs)
        return plan

    def fail(*args: Any) -> Any:
        raise ZeroDivisionError("planted")

    costs.begin_round = planned
    play = ScriptedPlay(speculator, config, seed=15)
    assert any(play.run(num_steps=12)) and not errors
    setattr(rule, fails, fail)
    num, left_out = len(play.lengths), play.num_left_out
    assert all(takes_runs)
    play.run(num_steps=14)
    assert len(errors) == 1 and costs.has_failed
    # The outcome that it fails on comes with the next step.
    assert not any(play.lengths[num + 4 :]) and play.num_left_out >= left_out + 8
    assert not any(takes_runs[-8:]) and speculator.cost_aware.stats()["has_failed"]
    assert not speculator._tail.params.packed.any()


def test_another_rule_and_back(tiny):
    config, speculator, rule = scripted(tiny, seed=4)
    play = ScriptedPlay(speculator, config, seed=14)
    play.run(num_steps=6)
    told = len(rule.told)
    speculator.reconfigure({"rule": "confidence", "threshold": 0.45})
    other = Play(speculator, config, Stops(0.45), seed=15)
    other.run(num_steps=4)
    assert len(rule.told) == told
    for name in list(other.requests):
        other.leave(name)
    speculator.reconfigure({"rule": "cost_aware"})
    assert speculator.cost_aware.rule is rule and speculator.round.rule is speculator._tail
    rule.plans, rule.told = [], []
    again = ScriptedPlay(speculator, config, seed=16)
    assert len(set(again.run(num_steps=8))) >= 3 and again.num_checked >= 6


MUTATIONS = Bugs()
"""Each is given pytest's monkeypatch and a speculator."""
mutation = MUTATIONS.named


@mutation("last round's parameters are not replaced")
def _(monkeypatch, s):
    monkeypatch.setattr(s._tail.params.__class__, "load", lambda self, **_: None)
    s._tail.open()


@mutation("what is drafted is not bounded by the room on the device")
def _(monkeypatch, s):
    original = s._tail.start
    monkeypatch.setattr(s, "_known_room", lambda batch, limits: limits[:, 0].tolist())
    monkeypatch.setattr(s._tail, "start", lambda most, running: original(torch.full_like(most, 99), running))


@mutation("requests that sit out draft too")
def _(monkeypatch, s):
    def everybody(most: torch.Tensor, running: torch.Tensor) -> None:
        running.copy_(most > 0)
        s._tail.params.limits.copy_(most)

    after(monkeypatch, s._tail, "start", everybody)


@mutation("the plan's longest length is one too short")
def _(monkeypatch, s):
    original = s._plan

    def plan(*args: Any) -> Any:
        made = original(*args)
        return dataclasses.replace(made, longest=max(made.longest - 1, 0))

    monkeypatch.setattr(s, "_plan", plan)


@mutation("last round's widths are reported")
def _(monkeypatch, s):
    kept = s._tail.widths.clone()
    after(monkeypatch, s.cost_aware, "drafted", lambda *_: kept.copy_(s._tail.widths))
    after(monkeypatch, s._tail, "start", lambda *_: s._tail.widths.copy_(kept))


@mutation("scores of other rows are reported")
def _(monkeypatch, s):
    original = s._tail.report

    def report(lengths: torch.Tensor) -> torch.Tensor:
        s._tail._scores[:, : len(lengths)] = s._tail._scores[:, : len(lengths)].flip(1)
        return original(lengths)

    monkeypatch.setattr(s._tail, "report", report)


@mutation("lengths before the last pass are reported")
def _(monkeypatch, s):
    original = s.cost_aware.drafted
    monkeypatch.setattr(s.cost_aware, "drafted", lambda *args: original(*args[:3], (args[3] - 1).clamp(min=0)))


@mutation("outcomes go to the round before")
def _(monkeypatch, s):
    original, drafted = s.cost_aware.verified, []

    def verified(*args: Any) -> None:
        drafted.append(s.cost_aware._last)
        s.cost_aware._last = drafted[max(len(drafted) - 2, 0)]
        original(*args)

    monkeypatch.setattr(s.cost_aware, "verified", verified)


@mutation("booked room counts as verified")
def _(monkeypatch, s):
    original = v2_cost_aware._outcomes

    def outcomes(round_: Any, names: Any, old: Any, rows: Any) -> dict[str, tuple[int, int]]:
        booked = {i: (n - 1 + r, n - 1) for i, (n, r) in zip(names, rows, strict=True)}
        return {i: booked[i] for i in original(round_, names, old, rows)}

    monkeypatch.setattr(v2_cost_aware, "_outcomes", outcomes)


@mutation("a prompt that was read again counts as a verification")
def _(monkeypatch, s):
    original = s.cost_aware.verified
    monkeypatch.setattr(s.cost_aware, "verified", lambda ids, old, *args: original(ids, [False] * len(ids), *args))


@mutation("rejected counts as accepted")
def _(monkeypatch, s):
    original = s.cost_aware.verified
    monkeypatch.setattr(
        s.cost_aware, "verified", lambda ids, old, new, no: original(ids, old, new + no, torch.zeros_like(no))
    )


@mutation("times of steps with another batch are taken")
def _(monkeypatch, s):
    original = s.cost_aware.finish
    monkeypatch.setattr(
        s.cost_aware, "finish", lambda round_, step, told, n, seconds: original(round_, step, told, len(told), seconds)
    )


@mutation("times of first passes over prompts are taken")
def _(monkeypatch, s):
    original = s.cost_aware.drafted
    monkeypatch.setattr(s.cost_aware, "drafted", lambda read, *args: original([], *args))


@mutation("passes that caught up are not told of")
def _(monkeypatch, s):
    original = s.cost_aware.drafted
    monkeypatch.setattr(s.cost_aware, "drafted", lambda read, *args: original(read[-1:], *args))


def _mutant_play(tiny: Any, monkeypatch: Any, plant: Any) -> list[int]:
    config, speculator, _ = scripted(tiny, seed=7)
    if plant is not None:
        plant(monkeypatch, speculator)
    return ScriptedPlay(speculator, config, seed=5, books=True).run(num_steps=20)


def test_without_a_bug_all_is_well(tiny, monkeypatch):
    assert len(set(_mutant_play(tiny, monkeypatch, None))) >= 5


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_play_notices(tiny, monkeypatch, name):
    with pytest.raises((AssertionError, IndexError)):
        _mutant_play(tiny, monkeypatch, MUTATIONS[name])


def test_every_round_draws_by_noise_of_its_own(tiny):
    """By seed and position alone a token drawn anew would be the one that the rule has already learnt from."""
    config, speculator, _ = scripted(tiny, seed=2)
    used: list[tuple[int, ...]] = []
    observe = speculator.round.observe_pass

    def watched(step: int, *args: Any) -> None:
        if step == 1:
            used.append(tuple(speculator.seeds.tolist()))
        observe(step, *args)

    speculator.round.observe_pass = watched
    ScriptedPlay(speculator, config, seed=11).run(num_steps=15)
    assert len(used) >= 5
    assert all(len(set(column)) == len(used) for column in zip(*used, strict=True))
