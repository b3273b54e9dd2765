# SPDX-License-Identifier: Apache-2.0
"""Short runs; the whole table comes from `python -m benchmarks.simulate`."""

from __future__ import annotations

import json
from itertools import groupby

import numpy as np
import pytest
import torch

from benchmarks import simulate
from benchmarks.simulate import DEPTH, SETTINGS, Bench, cost_model, informed_rate, make
from benchmarks.simulated_streams import PROMPT_TOKENS, windows
from vllm_specdecpp.data.shards import Manifest, RoundRecord, create_dataset, shard_from_rounds, write_shard
from vllm_specdecpp.decision.cost_aware.online import AcceptanceModel
from vllm_specdecpp.decision.cost_aware.rule import CostAwareRule


def rates(costs, stream, tokens=3000, **kwargs):
    setting = SETTINGS[costs]
    tokens *= 1 if setting.batch == 1 else 4  # the same number of rounds to learn in, or near it
    streams = [make(stream, tokens // setting.batch + 400, i) for i in range(setting.batch)]
    bench = Bench(setting, streams, tokens)
    rule = CostAwareRule(cost_model(setting, 0, kwargs.pop("scale", 1.0)), DEPTH, **kwargs)
    fixed = [bench.fixed(k) for k in (0, 1, 2, 3, 5, 8)]
    return bench.cost_aware(rule, 0)[0], fixed, bench


@pytest.mark.parametrize(
    ("costs", "stream"), [("cpu", "flat"), ("paper", "markov"), ("dear", "markov"), ("b64", "poor")]
)
def test_close_to_the_best_fixed_length_or_better(costs, stream):
    rate, fixed, _ = rates(costs, stream)
    assert rate > 0.95 * max(fixed)
    assert rate > 0.97 * fixed[0]


def test_the_oracle_drafts_what_will_be_accepted():
    """Three accepted, one not, over and over: four tokens for three draft passes and one verification."""
    setting = SETTINGS["paper"]
    accept = np.tile([1.0, 1.0, 1.0, 0.0], 100)
    bench = Bench(setting, [windows(accept, np.full(400, 0.5))], 380)
    assert bench.oracle() == pytest.approx(4 / (3 * 0.023 + 0.109))
    _, fixed, bench = rates("paper", "markov")
    best = max(*fixed, *(bench.threshold(h, True) for h in simulate.THRESHOLDS))
    assert bench.oracle() > 1.05 * best


def test_finds_its_way_back_after_a_workload_that_was_not_worth_drafting():
    rate, fixed, _ = rates("cpu", "shift", tokens=5000)
    assert rate > 1.02 * max(fixed)


def test_drafting_that_never_pays_costs_next_to_nothing():
    for costs in ("paper", "cpu_b4"):
        rate, fixed, _ = rates(costs, "poor", tokens=4000)
        assert rate > 0.99 * fixed[0] == 0.99 * max(fixed)


def test_a_lagged_score_does_what_it_can():
    setting, tokens = SETTINGS["paper"], 5000
    bench = Bench(setting, [make("markov", tokens, 0)], tokens)
    rule = CostAwareRule(cost_model(setting, 0), DEPTH, lag=1)
    rate, _, _ = bench.cost_aware(rule, 0)
    lagged = max(bench.threshold(h, cumulative, lag=1) for h in simulate.THRESHOLDS for cumulative in (True, False))
    fixed = max(bench.fixed(k) for k in (0, 1, 2, 3, 5, 8))
    model = simulate.calibrated([make("markov", tokens, 99)])
    informed = informed_rate(bench, simulate.true_costs(setting), model, fixed, lag=1)
    assert informed > 1.02 * fixed  # a lagged score is worth something
    assert rate > 0.97 * max(informed, lagged) and rate > 1.02 * fixed
    prompt, _, _ = bench.cost_aware(CostAwareRule(cost_model(setting, 0), DEPTH), 0)
    assert prompt > 1.01 * rate  # and one in time worth more


def test_the_informed_rule_is_the_better_for_what_it_knows():
    setting, tokens = SETTINGS["paper"], 4000
    bench = Bench(setting, [make("overconfident", tokens, 0)], tokens)
    costs = simulate.true_costs(setting)
    assert costs.round_seconds([1, 1], 3) == pytest.approx(setting.round([1, 1], 3))
    model = simulate.calibrated([make("overconfident", tokens, 99)])
    rate = informed_rate(bench, costs, model, bench.fixed(2))
    assert rate > 1.02 * informed_rate(bench, costs, AcceptanceModel(), bench.fixed(2))
    assert rate > bench.fixed(2)


def test_planned_rounds_cost_what_served_ones_do():
    setting = SETTINGS["cpu_b4"]
    bench = Bench(setting, [make("markov", 500, i) for i in range(4)], 1500)

    def draft(ids, scores, limit):
        return np.minimum(limit, 3), [4, 4, 4]

    assert bench.fixed(3) == pytest.approx(bench.serve(draft)[0])


def in_turn(served):
    """(id, rounds in a row) of each request of one place in the batch."""
    turns = [(name, len(list(rounds))) for name, rounds in groupby(served)]
    assert len({name for name, _ in turns}) == len(turns)  # an id never comes back
    return turns


def test_the_rule_meets_a_new_request_for_each_prompt_and_each_place_in_the_batch():
    """Nothing is accepted: a token a round. Text that begins again is new requests, too."""
    served = []

    class Spy(CostAwareRule):
        def begin(self, request_ids, max_lengths):
            served.append(list(request_ids))
            return super().begin(request_ids, max_lengths)

    setting = SETTINGS["cpu_b4"]
    stream = windows(np.zeros(300), np.full(300, 0.5))
    Bench(setting, [stream] * 4, 4 * 700).cost_aware(Spy(cost_model(setting, 0), DEPTH), 0)
    places = list(zip(*(ids for ids in served if ids), strict=True))
    assert len(places) == 4 and not any(set(a) & set(b) for a in places for b in places if a is not b)
    rest = 300 - 2 * PROMPT_TOKENS
    lap = [PROMPT_TOKENS, PROMPT_TOKENS, rest]
    assert all([num for _, num in in_turn(place)] == [*lap, *lap, 100] for place in places)


def rich_and_poor(num, seed):
    """Prompts by turns: 19 of 20 candidates accepted, or 2 of 5; the scores are right but for some noise."""
    rng = np.random.default_rng(seed)
    mean = np.where(np.arange(num) // PROMPT_TOKENS % 2 == 0, 0.95, 0.4)
    p = 1 / (1 + np.exp(-(np.log(mean / (1 - mean)) + rng.normal(0, 0.5, num))))
    return windows((rng.random(num) < p).astype(float), p)


def test_poor_prompts_between_rich_ones_are_drafted_where_that_beats_no_drafting():
    """A candidate of a poor prompt brings less than rho, but 8 % more than K = 0."""
    setting, tokens = SETTINGS["one_core"], 4000
    gains = []
    for seed in range(2):
        bench = Bench(setting, [rich_and_poor(tokens, seed)], tokens)
        rate, _, _ = bench.cost_aware(CostAwareRule(cost_model(setting, seed), DEPTH), seed)
        gains.append(rate / max(bench.fixed(k) for k in range(5)))
    assert np.mean(gains) > 1.06


def test_costs_measured_wrong_by_half_are_put_right():
    rate, fixed, _ = rates("paper", "markov", scale=1.5)
    assert rate > max(fixed)


def test_without_calibration_overconfident_scores_cost():
    live, _, _ = rates("paper", "overconfident", guarded=False)
    frozen, _, _ = rates("paper", "overconfident", guarded=False, adapt=False)
    assert live > 1.02 * frozen


def rounds_of(prompt: int, accepted: list[int], num_candidates: int, top1: float) -> list[RoundRecord]:
    columns = {name: torch.full((num_candidates,), top1) for name in ("top1_prob", "entropy", "margin")}
    return [
        RoundRecord(
            request_id=str(prompt), hidden_states=torch.zeros(num_candidates, 4), token_ids=[7] * num_candidates,
            drawn_logprob=torch.zeros(num_candidates), soft_label=torch.full((num_candidates,), torch.nan),
            num_accepted=run, num_verified=num_candidates, emitted=1 + 3 * at, temperature=0.0, **columns,
        )
        for at, run in enumerate(accepted)
    ]  # fmt: skip


@pytest.fixture
def record(tmp_path):
    manifest = Manifest(
        kind="rounds", target="t", draft="d", target_revision=None, draft_revision=None, hidden_size=4,
        source="on-policy", sampling={}, num_candidates=5, prompts_digest="", num_prompts=2, unit_size=2, versions={},
        git="", command="", created="",
    )  # fmt: skip
    dataset = create_dataset(tmp_path / "data", manifest, False)
    rounds = rounds_of(0, [2, 5], 5, 0.25) + rounds_of(1, [0], 5, 0.75)
    prompts = {"0": {"id": "a", "set": "code"}, "1": {"id": "b", "set": "chat"}}
    write_shard(dataset.shard_path(0), shard_from_rounds(rounds, prompts), manifest)
    return tmp_path / "data"


def test_a_record_starts_at_every_offset_of_an_accepted_run(record):
    code = simulate.recorded(record, 8, 0, "code")
    assert code.run.tolist() == [2, 1, 0, 5, 4, 3, 2, 1]
    assert code.limit.tolist() == [5, 4, 3, 5, 4, 3, 2, 1]
    assert code.scores[1].tolist() == [0.25] * 4 + [0.5] * (DEPTH - 4)
    assert set(simulate.recorded(record, 20, 0).scores[:, 0].tolist()) == {0.25, 0.75}


def test_recorded_prompts_are_requests_of_their_own(record):
    stream = simulate.recorded(record, 20, 0)  # 8 positions of one prompt and 1 of the other, three times
    bench, served = Bench(SETTINGS["cpu"], [stream], 54), []

    def draft(ids, scores, limit):
        served.append((ids[0], scores[0, 0]))
        return np.zeros(1, dtype=np.int64), []

    bench.serve(draft)
    assert len(in_turn(served)) == len(in_turn([name for name, _ in served])) == 12
    assert sorted(num for _, num in in_turn(served)) == [1] * 6 + [8] * 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--streams", "nonsense"], "--streams nonsense is unknown"),
        (["--streams", "recorded:code"], "needs --train"),
        (["--streams", "recorded:poetry", "--train", "DATA"], "no round of set 'poetry'"),
    ],
)
def test_user_errors_are_one_line(record, capsys, arguments, message):
    with_record = [*arguments, "--record", str(record)] if ":" in arguments[1] else arguments
    assert simulate.main([str(record) if word == "DATA" else word for word in with_record]) == 2
    assert message in capsys.readouterr().err


def test_a_recorded_stream_needs_its_record(capsys):
    assert simulate.main(["--streams", "recorded"]) == 2
    assert "needs --" in capsys.readouterr().err


def test_writes_rows_a_page_and_a_plot(record, tmp_path, capsys):
    out = tmp_path / "results" / "x.jsonl"
    command = ["--costs", "paper", "b64", "--streams", "recorded:code", "flat", "--tokens", "300"]
    command += ["--record", str(record), "--train", str(record), "--out", str(out)]
    assert simulate.main(command) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["costs"], row["stream"]) for row in rows] == [
        ("paper", "recorded:code"), ("paper", "flat"), ("b64", "recorded:code"), ("b64", "flat"),
    ]  # fmt: skip
    assert all(row["cost_aware"] > 0 and row["informed"] > 0 and row["git"] for row in rows)
    assert all(row["oracle"] >= row["fixed"] for row in rows)
    page = out.with_suffix(".md").read_text()
    assert page.count("\n| ") == 5 and "Each prompt is a new request" in page
    assert "geometric mean" in page and "python -m benchmarks.simulate" in page
    assert out.with_suffix(".png").stat().st_size > 5000
    capsys.readouterr()
    assert simulate.main(command) == 2  # nothing is overwritten
    assert "--force" in capsys.readouterr().err
    assert simulate.main([*command, "--force"]) == 0
