# SPDX-License-Identifier: Apache-2.0
"""Planted bugs in the V2 speculator: the oracle harness notices every one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.planted_bugs import Bugs, after, change_arguments
from tests.v2 import harness
from tests.v2.oracle import Stops
from tests.v2.play import Play

THRESHOLD, MIN_LENGTH, MAX_LENGTH = 0.45, 2, 5

MUTATIONS = Bugs()
"""Each is given pytest's monkeypatch and a speculator."""
mutation = MUTATIONS.named


@mutation("wrong candidate fed back")
def _(monkeypatch, s):
    after(monkeypatch, s, "_load_candidates", lambda n: s.input_buffers.input_ids[:n].add_(1).remainder_(512))


@mutation("candidates of the wrong rows fed back")
def _(monkeypatch, s):
    after(monkeypatch, s, "_load_candidates", lambda n: _flip(s.input_buffers.input_ids[:n]))


@mutation("position one too high in later passes")
def _(monkeypatch, s):
    after(monkeypatch, s, "_load_candidates", lambda n: s.input_buffers.positions[:n].add_(1))


@mutation("position stands still")
def _(monkeypatch, s):
    def stand(n: int) -> None:
        s.input_buffers.positions[:n] = s.round.next_positions[:n] + 1

    after(monkeypatch, s, "_load_candidates", stand)


@mutation("attention misses the newest token")
def _(monkeypatch, s):
    after(monkeypatch, s, "_load_candidates", lambda n: s.input_buffers.seq_lens[:n].sub_(1))


@mutation("stopped requests write KV")
def _(monkeypatch, s):
    after(monkeypatch, s, "_load_candidates", lambda n: s._writing[:n].copy_(s.idx_mapping[:n]))


@mutation("KV of candidates not written")
def _(monkeypatch, s):
    after(monkeypatch, s, "_load_candidates", lambda n: s._writing[:n].fill_(-1))


@mutation("KV written into another request's slots")
def _(monkeypatch, s):
    after(monkeypatch, s, "_load_candidates", lambda n: s._writing[:n].copy_(s._writing[:n].roll(1)))


@mutation("query starts of the first pass are left in place")
def _(monkeypatch, s):
    before = s.input_buffers.query_start_loc.clone()

    def keep(n: int) -> None:
        s.input_buffers.query_start_loc[: n + 1] = before[: n + 1]

    after(monkeypatch, s.round, "append_drawn", lambda *_: before.copy_(s.input_buffers.query_start_loc))
    after(monkeypatch, s, "_load_candidates", keep)


@mutation("the short first pass reads the wrong last token")
def _(monkeypatch, s):
    after(monkeypatch, s, "_load_short", lambda n: s.input_buffers.input_ids[: 2 * n : 2].add_(1).remainder_(512))


@mutation("the short first pass is read one position too low")
def _(monkeypatch, s):
    after(monkeypatch, s, "_load_short", lambda n: s.input_buffers.positions[: 2 * n].sub_(1).clamp_(min=0))


@mutation("the short first pass writes no KV")
def _(monkeypatch, s):
    after(monkeypatch, s, "_load_short", lambda n: s._writing[:n].fill_(-1))


@mutation("the short first pass starts from what was rejected")
def _(monkeypatch, s):
    change_arguments(monkeypatch, s, "_stage_short", lambda batch, rej, last: (batch, torch.zeros_like(rej), last))


@mutation("prompts get the short first pass")
def _(monkeypatch, s):
    monkeypatch.setattr(s, "_can_read_short", lambda batch: True)


@mutation("one token is read where two are needed")
def _(monkeypatch, s):
    """The candidate that was drawn last and never fed back, then accepted, is missing from the KV."""

    def skip_first(n: int) -> None:
        s.input_buffers.positions[: 2 * n : 2] = s.input_buffers.positions[1 : 2 * n : 2]
        s.input_buffers.input_ids[: 2 * n : 2] = s.input_buffers.input_ids[1 : 2 * n : 2]

    after(monkeypatch, s, "_load_short", skip_first)


@mutation("no first pass when nothing may be drafted")
def _(monkeypatch, s):
    original = s._draft
    monkeypatch.setattr(s, "_draft", lambda *args: original(*args) if args[3] else 0)


@mutation("the loop goes on when everybody has stopped")
def _(monkeypatch, s):
    after(monkeypatch, s.round, "append_drawn", lambda _: s.round.any_running.fill_(1))


@mutation("the loop ends with the first request that stops")
def _(monkeypatch, s):
    after(
        monkeypatch, s.round, "append_drawn",
        lambda drawn: s.round.any_running.copy_((s.round.running[: len(drawn)] > 0).all()),
    )  # fmt: skip


@mutation("survival is carried over from the last round")
def _(monkeypatch, s):
    kept = s.round.survival.clone()
    original = s.round.start

    def start(*args: Any) -> None:
        kept.copy_(s.round.survival)
        original(*args)
        s.round.survival.copy_(kept)

    monkeypatch.setattr(s.round, "start", start)


@mutation("scores of the wrong rows")
def _(monkeypatch, s):
    after(monkeypatch, s.round, "observe_pass", lambda k, logits, h: _flip(s.round.scores[: len(logits)]))


@mutation("the rule decides one candidate late")
def _(monkeypatch, s):
    late = torch.ones_like(s.round.scores)

    def swap(k: int, logits: torch.Tensor, hidden_states: torch.Tensor) -> None:
        n = len(logits)
        now = s.round.scores[:n].clone()
        s.round.scores[:n] = 1.0 if k == 1 else late[:n]
        late[:n] = now

    after(monkeypatch, s.round, "observe_pass", swap)


@mutation("the least length is ignored")
def _(monkeypatch, s):
    s.round.min_length = 1


@mutation("the last round's candidates are not cleared")
def _(monkeypatch, s):
    kept = s.draft_tokens.clone()
    original = s.round.start

    def start(*args: Any) -> None:
        kept.copy_(s.draft_tokens)
        original(*args)
        s.draft_tokens.copy_(kept)

    monkeypatch.setattr(s.round, "start", start)


@mutation("the request's own cap is ignored")
def _(monkeypatch, s):
    original = s.requests.table

    def table(request_ids: Any, bound: int, max_model_len: int) -> Any:
        rows = original(request_ids, bound, max_model_len)
        rows[:, 0] = bound
        return rows

    monkeypatch.setattr(s.requests, "table", table)


@mutation("limits of the wrong rows")
def _(monkeypatch, s):
    original = s.requests.table
    monkeypatch.setattr(s.requests, "table", lambda *args: original(*args)[::-1].copy())


@mutation("one candidate too many at a request's end")
def _(monkeypatch, s):
    change_arguments(monkeypatch, s.round, "start", lambda n, lens, rej, new: (n, _end_later(s, n, lens), rej, new))


@mutation("stop tokens are ignored")
def _(monkeypatch, s):
    after(monkeypatch, s.round, "start", lambda n, *_: s.round.limits[:n, 2:].fill_(-1))


@mutation("a prompt that is not read to its end is drafted for")
def _(monkeypatch, s):
    change_arguments(monkeypatch, s.round, "start", lambda n, lens, rej, new: (n, lens, rej, torch.ones_like(new)))


@mutation("rejected candidates count as verified")
def _(monkeypatch, s):
    change_arguments(monkeypatch, s.round, "start", lambda n, lens, rej, new: (n, lens, torch.zeros_like(rej), new))


@mutation("the scheduler's own number of candidates is ignored")
def _(monkeypatch, s):
    original = s.propose
    monkeypatch.setattr(s, "propose", lambda *args, num_speculative_tokens=None: original(*args))


@mutation("a length one too long is handed over")
def _(monkeypatch, s):
    after(monkeypatch, s, "_note", lambda *_: s.submitted.add_(1))


@mutation("-1 is handed to the target as an input")
def _(monkeypatch, s):
    original = s.propose

    def propose(batch: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        original(batch, *args, **kwargs)
        return s.draft_tokens[: batch.num_reqs].clone()

    monkeypatch.setattr(s, "propose", propose)


def _flip(values: torch.Tensor) -> None:
    values.copy_(values.flip(0))


def _end_later(s: Any, num_reqs: int, seq_lens: torch.Tensor) -> torch.Tensor:
    s.round.limits[:num_reqs, 1] += 1
    return seq_lens


def _play(tiny: Any, monkeypatch: Any, patch: Callable[..., None] | None) -> list[int]:
    config, speculator = harness.speculator(
        tiny, rule="confidence", threshold=THRESHOLD, num_speculative_tokens=MAX_LENGTH,
        min_speculative_tokens=MIN_LENGTH,
    )  # fmt: skip
    if patch is not None:
        patch(monkeypatch, speculator)
    return Play(speculator, config, Stops(THRESHOLD, MIN_LENGTH), seed=5).run(num_steps=30)


def test_without_a_bug_all_is_well(tiny, monkeypatch):
    lengths = _play(tiny, monkeypatch, None)
    assert set(range(MAX_LENGTH + 1)) <= set(lengths)


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_harness_notices(tiny, monkeypatch, name):
    with pytest.raises((AssertionError, IndexError)):
        _play(tiny, monkeypatch, MUTATIONS[name])
