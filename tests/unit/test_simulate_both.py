# SPDX-License-Identifier: Apache-2.0
"""The simulator of drafts and free runs together: what was recorded, every rule's round, and the shortest path."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.simulate import both
from benchmarks.simulate.chains import Informed, Ngram, Ours, Place, serve
from benchmarks.simulate.settings import Setting, true_costs
from benchmarks.simulate.texts import WRONG, Text, least_seconds, recorded_texts
from tests.dataset_files import make_manifest
from vllm_specdecpp.data.shard_file import RoundRecord, shard_from_rounds, write_shard
from vllm_specdecpp.data.shards import create_dataset
from vllm_specdecpp.decision.cost_aware.admission import Admitted
from vllm_specdecpp.decision.cost_aware.drafting import CostAwareRound
from vllm_specdecpp.training.collect.responses import write_responses

FLAT = Setting(lambda b: 2.0, lambda b: 1.0, lambda n: 10.0, 1, per_read=0.5)
ROWS = Setting(lambda b: 2.0, lambda b: 1.0, lambda n: 9.0 + n, 1, per_read=0.5)
ANSWER = [5, 6, 7, 8, 9, 2]


def text(drafts: bool = True) -> Text:
    """[5, 6, 7, 8, 9, 1], answered by itself but for the end; the draft model, if it ever drafts, is right."""
    tokens = [5, 6, 7, 8, 9, 1, *ANSWER]
    right = {at: (tokens[at:], [0.9] * (12 - at)) for at in range(7, 12)}
    return Text("a", 6, tokens, right if drafts else {}, 40)


def record(folder: Path, rounds: dict[str, list[tuple[list[int], int]]], answer: list[int], **sampling: float) -> Path:
    sampling = {"temperature": 0.0, "max_tokens": 40, **sampling}
    manifest = make_manifest(hidden_size=4, sampling=sampling, num_candidates=16)
    dataset = create_dataset(folder, manifest, False)
    records = [
        RoundRecord(
            request_id=name, hidden_states=torch.zeros(len(ids), 4), token_ids=ids,
            soft_label=torch.full((len(ids),), torch.nan), num_accepted=won, num_verified=len(ids), emitted=1 + at,
            temperature=0.0, entropy=torch.zeros(len(ids)), margin=torch.zeros(len(ids)),
            top1_prob=torch.linspace(0.9, 0.5, len(ids)),
        )
        for name, its in rounds.items() for at, (ids, won) in enumerate(its)
    ]  # fmt: skip
    write_shard(dataset.shard_path(0), shard_from_rounds(records, {i: {"id": i, "set": "a"} for i in rounds}), manifest)
    rows = [{"id": i, "set": "a", "prompt_token_ids": [1, 2], "token_ids": answer} for i in rounds]
    write_responses(folder, 0, rows)
    return folder


def test_a_record_tells_the_draft_of_every_place(tmp_path: Path) -> None:
    """2 of 4 accepted, then 2 of 2: nobody saw the candidate behind those; half of the others' outcomes were right."""
    rounds = {"x": [([4, 5, 0, 0], 2), ([7, 8], 2)]}
    (found,) = recorded_texts(record(tmp_path / "d", rounds, [3, 4, 5, 6, 7, 8, 9]))
    guess = found.drafts[8][0][0]
    assert guess in (9, WRONG) and (found.prompt, found.max_tokens, found.set) == (2, 40, "a")
    assert {at: ids for at, (ids, _) in found.drafts.items()} == {
        3: [4, 5, 0, 0], 4: [5, 0, 0], 5: [0, 0], 6: [7, 8, guess], 7: [8, guess], 8: [guess],
    }  # fmt: skip
    assert found.drafts[6][1] == pytest.approx([0.9, 0.5, 0.5]) and found.won(6, [7, 8, WRONG]) == 2
    assert found.drawn(8) == ([guess] + [WRONG] * 15, [pytest.approx(0.5)] * 16)
    with pytest.raises(ValueError, match="temperature 1"):
        next(recorded_texts(record(tmp_path / "hot", rounds, [3], temperature=1.0)))


def forced(**options: bool) -> Ours:
    """Drafts in any case, and to its limit, since time is worth next to nothing; runs are thought to be sure."""
    policy = Ours(true_costs(FLAT), **options)
    for model in policy.rule.free_runs.models.values():
        model.theta[1] = 9.0

    def begin(batch, runs):
        yes, limits = np.array([True]), np.array([min(s.limit, 16) for s in batch])
        return CostAwareRound(policy.rule, ["0"], limits, yes, 1e-9, Admitted(yes, 1e-9, 1.0))

    policy.rule.begin = begin  # type: ignore[method-assign, assignment]
    return policy


@pytest.mark.parametrize(
    ("policy", "setting", "seconds"),
    [
        (lambda: Ngram(longest=0), ROWS, 50.0),  # five rounds
        (Ngram, ROWS, 10.0 + 16.0),  # nothing behind [1, 5]; behind [5, 6] six tokens, three of them right
        (lambda: Ours(true_costs(FLAT), drafts=False), FLAT, 10.0),  # rows cost nothing
        (lambda: forced(runs=False), FLAT, 2.5 + 2.0 + 15.0 + 10.0),  # five tokens are read, sixteen are drawn
        (lambda: forced(chains=False), FLAT, 2.5 + 2.0 + 15.0 + 10.0),
        (forced, FLAT, 2.5 + 2.0 + 10.0),  # one is drawn, since the run behind it promises more
    ],
)
def test_rounds_cost_what_they_do_by_hand(policy, setting: Setting, seconds: float) -> None:
    assert serve(text(), "0", policy(), setting, np.random.default_rng(0)) == pytest.approx(seconds)


def test_the_draft_model_has_read_what_was_accepted() -> None:
    """One of two is right in each of three rounds: only the prompt is ever read beyond the usual two tokens."""
    one = text()
    one.drafts = {at: ([one.tokens[at], WRONG], [0.9, 0.9]) for at in range(7, 12)}
    seconds = serve(one, "0", forced(runs=False), FLAT, np.random.default_rng(0))
    assert seconds == pytest.approx(2.5 + 3 * (2.0 + 15.0 + 10.0))


@pytest.mark.parametrize(
    ("price", "drafts", "candidates", "passes"),
    [
        (1e-9, False, [6, 7, 8, 9, 1], 0),  # rows cost next to nothing: the run
        (1e3, True, [], 0),  # no row is worth its price
        (0.3, True, [6], 1),  # the run was never right, the draft always
    ],
)
def test_the_informed_rule_knows_the_price(price: float, drafts: bool, candidates: list[int], passes: int) -> None:
    other = text()
    other.tokens = [5, 4, 3, *range(10, 40)]  # nothing repeats itself, but for single tokens:
    other.tokens[2::3] = [3] * 11
    other.prompt, other.drafts = 3, {at: (other.tokens[at:][:16], [0.9] * 16) for at in range(4, 33)}
    policy = Informed([other] * 4)
    policy.rule.costs, policy.price, policy.drafts = true_costs(ROWS), price, drafts
    found, num = policy.begin(Place(text(), "0", 7))
    assert found[: max(len(candidates), 1)] == candidates and bool(num) == bool(passes)


def test_ngram_is_vllms() -> None:
    proposer = pytest.importorskip("vllm.v1.spec_decode.ngram_proposer")
    theirs, rng, some = proposer._find_longest_matched_ngram_and_propose_tokens, np.random.default_rng(0), 0
    for _ in range(200):
        tokens = rng.integers(0, 4, rng.integers(2, 40))
        mine, _ = Ngram().begin(Place(Text("a", 0, tokens.tolist(), {}, 100), "0", len(tokens)))
        assert mine == theirs(tokens.astype(np.int32), 2, 5, 1000, 8).tolist()
        some += bool(mine)
    assert some > 100


def test_the_shortest_path_is_that_of_all_ways() -> None:
    """The answer itself, and random ones against every choice of drafts and runs in every round."""
    assert least_seconds(text(), ROWS) == 14.0  # four candidates of the run, at once
    dear = Setting(lambda b: 2.0, lambda b: 1.0, lambda n: 9.0 + 20.0 * (n > 2), 1, per_read=0.5)
    drafted = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        tokens = rng.integers(0, 3, 12).tolist()
        drafts = {}
        for at in range(4, 12):
            right = int(rng.integers(0, 4))
            drafts[at] = (tokens[at : at + right] + [WRONG] * (4 - right), [0.5] * 4)
        one = Text("a", 3, tokens, drafts, 10)
        setting = (ROWS, FLAT, dear, Setting(lambda b: 0.1, lambda b: 0.1, lambda n: 9.0 + n, 1, per_read=0.2))[
            seed % 4
        ]

        @functools.cache
        def least(at: int, held: int, one: Text = one, setting: Setting = setting) -> float:
            if at >= 12:
                return 0.0
            found = np.inf
            for k in range(one.limit(at) + 1):
                drawn = one.drawn(at)[0][:k]
                for run in range(min(one.limit(at) - k, 5) + 1):
                    if run and not one.runs(at, drawn):
                        continue
                    candidates = drawn + (one.runs(at, drawn)[0].token_ids[:run] if run else [])
                    won = one.won(at, candidates)
                    seconds = setting.draft([1] * k, max(at - held - 2, 0)) + setting.verify(1 + k + run)
                    to = at + min(won, k - 1) if k else held
                    found = min(found, seconds + least(at + won + 1, to))
            return found

        without = Text("a", 3, tokens, {}, 10)
        drafted += least_seconds(one, setting) < least_seconds(without, setting)
        assert least_seconds(one, setting) == pytest.approx(least(4, 0))
    assert drafted > 10


def test_all_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = [3, 4, 5, 6] * 8
    tokens = [1, 2, *answer]
    rounds = {str(i): [(tokens[at : at + 3] + [0], 3) for at in range(3, 30, 4)] for i in range(4)}
    folder = record(tmp_path / "d", rounds, answer)
    command = [
        "--record",
        str(folder),
        "--costs",
        "cheap",
        "one_core",
        "--seeds",
        "2",
        "--out",
        str(tmp_path / "x.jsonl"),
    ]
    assert both.main(command) == 0
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [(row["costs"], row["set"], row["requests"]) for row in rows] == [("cheap", "a", 4), ("one_core", "a", 4)]
    for row in rows:
        assert row["clairvoyant"] >= row["informed"] > row["off"] and len(row["both_by_seed"]) == 2
        assert row["clairvoyant"] >= max(row[policy] for policy in both.POLICIES)
    table = (tmp_path / "x.md").read_text()
    assert both.line(rows[0]) in table and "| one_core | mean |" in table and (tmp_path / "x.png").exists()
    assert both.main(command) == 2 and "is there already" in capsys.readouterr().err
