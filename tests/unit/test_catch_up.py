# SPDX-License-Identifier: Apache-2.0
"""Reading what the draft missed is paid for before it is done."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_specdecpp.decision.cost_aware.catch_up import PROBE_SHARE, CatchUp

TIMES = {"first_seconds": 0.1, "off_seconds": 1.0}


def _ask(catch_up: CatchUp, ids: str, wanted: list[bool], seconds: list[float], speedup: float = 1.5,
         probe: bool = False, remaining: float = 0.0, room: int = 10**6, least: int = 1) -> list[bool]:  # fmt: skip
    return catch_up.allowed(
        list(ids), np.array(wanted), seconds, [remaining] * len(ids), [room] * len(ids), speedup=speedup, probe=probe,
        share_seconds=1.0 / len(ids), pays=lambda drafts: int(drafts.sum()) >= least, **TIMES,
    ).tolist()  # fmt: skip


def test_usual_rounds_are_not_touched():
    catch_up = CatchUp()
    for _ in range(5):
        assert _ask(catch_up, "abc", [True, False, True], [0.0, 9.0, 0.05]) == [True, False, True]


@pytest.mark.parametrize(("speedup", "num_reqs", "rounds"), [(1.5, 1, 4), (1.5, 2, 8), (2.0, 1, 2), (1.0, 1, 525)])
def test_a_request_forgoes_what_reading_costs_first(speedup: float, num_reqs: int, rounds: int):
    """2 s to read: drafting gains (speedup - 1) seconds a round, shared by the batch."""
    catch_up, ids = CatchUp(), "abcd"[:num_reqs]
    seconds = [2.0] + [0.0] * (num_reqs - 1)
    answers = [_ask(catch_up, ids, [True] * num_reqs, seconds, speedup)[0] for _ in range(rounds + 1)]
    assert answers.index(True) == rounds - 1 and all(answers[:-1]) is (rounds == 1)


@pytest.mark.parametrize("num_reqs", [1, 2])
def test_a_prompt_is_read_at_once_if_its_answer_will_save_as_much(num_reqs: int):
    """At twice the speed, a token saves half of a second's share of the batch."""
    ids, wanted = "ab"[:num_reqs], [True] * num_reqs
    for tokens, read in ((9.9, False), (10.1, True)):
        assert _ask(CatchUp(), ids, wanted, [5.0 / num_reqs] * num_reqs, 2.0, remaining=tokens) == [read] * num_reqs
    assert not any(_ask(CatchUp(), ids, wanted, [5.0] * num_reqs, 0.9, remaining=1e6))  # drafting is slower


def test_where_no_request_is_worth_reading_one_is_read_now_and_then():
    """New requests all the time, each of which ends before it has forgone enough."""
    catch_up, rounds = CatchUp(), 4000
    read = [any(_ask(catch_up, f"{i:04d}"[-2:], [True, True], [2.0, 1.0], 0.9)) for i in range(rounds)]
    assert 0.8 * PROBE_SHARE * rounds < sum(read) <= PROBE_SHARE * rounds
    catch_up = CatchUp()  # not where another request drafts: that one tells
    assert not any(_ask(catch_up, "ab", [True, True], [2.0, 0.0], 0.9)[0] for _ in range(400))


def test_what_cannot_be_won_back_is_not_read_however_much_was_forgone():
    """At twice the speed a token saves half a second: two seconds need four tokens."""
    for room, read in ((3, False), (4, True)):
        catch_up = CatchUp()
        answers = [_ask(catch_up, "ab", [True, False], [1.0, 0.0], 2.0, room=room)[0] for _ in range(9)]
        assert any(answers) is read and not answers[0]


def test_after_it_was_read_the_next_stretch_is_saved_up_for_anew():
    catch_up = CatchUp()
    assert [_ask(catch_up, "a", [True], [1.0])[0] for _ in range(2)] == [False, True]
    assert [_ask(catch_up, "a", [True], [1.0])[0] for _ in range(2)] == [False, True]


def test_what_is_saved_outlasts_rounds_that_do_not_want_it_and_ends_with_the_request():
    catch_up = CatchUp()
    _ask(catch_up, "ab", [True, True], [1.0, 1.0])
    _ask(catch_up, "ab", [False, True], [1.0, 1.0])
    assert catch_up._forgone.keys() == {"a", "b"} and catch_up._forgone["b"] == pytest.approx(0.5)
    _ask(catch_up, "b", [True], [1.0])
    assert not catch_up._forgone  # a ended; b has been read


def test_probes_spend_no_more_than_their_share():
    catch_up, spent, rounds = CatchUp(), 0.0, 5000
    costs = [0.8, 0.3, 2.0]
    for _ in range(rounds):
        if any(allowed := _ask(catch_up, "abc", [True] * 3, costs, probe=True)):
            spent += sum(c for c, ok in zip(costs, allowed, strict=True) if ok)
    assert 0.8 * PROBE_SHARE * rounds < spent <= PROBE_SHARE * rounds


def test_a_probe_takes_the_cheapest_and_all_that_need_nothing():
    catch_up = CatchUp()
    for _ in range(100):
        _ask(catch_up, "abc", [False] * 3, [0.0] * 3)
    assert _ask(catch_up, "abc", [True] * 3, [0.5, 0.3, 0.0], probe=True) == [False, True, True]


def test_a_few_that_need_no_reading_do_not_draft_alone_where_that_does_not_pay():
    """Drafting pays for two and more; b and c end too soon to be read. A pass takes 0.1 s."""
    catch_up, rounds = CatchUp(), 4000
    alone = [_ask(catch_up, "abc", [True] * 3, [0.0, 9.0, 9.0], least=2, room=3)[0] for _ in range(rounds)]
    assert 0.8 * PROBE_SHARE * rounds / 0.1 < sum(alone) <= PROBE_SHARE * rounds / 0.1
    everyone = [True, False, False]  # who wants to: the gate has weighed it
    assert _ask(catch_up, "abc", everyone, [0.0, 9.0, 9.0], least=2) == everyone
    assert _ask(catch_up, "abc", [True] * 3, [0.0, 0.0, 9.0], least=2, room=3) == [True, True, False]


def test_those_that_do_not_pay_alone_keep_what_they_saved_until_they_are_enough():
    """Both are worth reading once they have forgone its two seconds, b a round later than a."""
    catch_up = CatchUp()
    assert _ask(catch_up, "ab", [True, False], [2.0, 2.0], least=2) == [False, False]
    answers = [_ask(catch_up, "ab", [True, True], [2.0, 2.0], least=2) for _ in range(8)]
    assert answers == [[False, False]] * 7 + [[True, True]]
