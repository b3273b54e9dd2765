# SPDX-License-Identifier: Apache-2.0
"""Short runs; the whole table comes from `python -m benchmarks.simulate`."""

from __future__ import annotations

import json
from itertools import groupby

import numpy as np
import pytest

from benchmarks.simulate import ablation as simulate_ablation
from benchmarks.simulate import play as simulate
from benchmarks.simulate.regret import curve, regret
from benchmarks.simulate.rules import Informed, Off, calibrated, informed_run
from benchmarks.simulate.server import Run, Server
from benchmarks.simulate.settings import SETTINGS, Setting, cost_model, true_costs
from benchmarks.simulate.streams import DEPTH, make, requests
from vllm_specdecpp.decision.cost_aware.acceptance import AcceptanceModel
from vllm_specdecpp.decision.cost_aware.rule import CostAwareRule

FLAT = Setting(lambda b: 0.1, lambda b: 0.1, lambda n: 1.0, 1, per_read=0.01)
"""A draft pass takes 0.1 s and 0.01 s for each token beyond the usual ones, the target's 1 s."""


class Planned:
    """Drafts so many candidates in the rounds that it is told to; keeps what it was shown."""

    lag = 0

    def __init__(self, length=3, when=lambda number: True):
        self.length, self.when, self.seen, self.finished = length, when, [], []

    def begin(self, standings):
        self.seen.append(standings)
        most = self.length if self.when(len(self.seen) - 1) else 0
        return Drafts(np.array([min(s.limit, most) for s in standings]))

    def finish(self, round_, *outcome):
        self.finished.append(outcome)


class Drafts:
    trial = False

    def __init__(self, planned):
        self.planned, self.lengths = planned, np.zeros(len(planned), dtype=np.int64)
        self.running = self.drafts = planned > 0
        self.widths = []

    def step(self, scores):
        self.widths.append(int(self.running.sum()))
        self.lengths = self.lengths + self.running
        self.running = self.lengths < self.planned


def text(accept, prompts=(1,), outputs=None, max_tokens=10**6):
    """One stream whose requests have these prompt and output lengths."""
    outputs = outputs or [len(accept)]
    starts = np.concatenate([[0], np.cumsum(outputs)])
    scores = np.full(len(accept), 0.5)
    return requests(np.array(accept, dtype=float), scores, starts, np.array(prompts), max_tokens)


def server_of(costs, stream, tokens, seed=0):
    setting = SETTINGS[costs]
    streams = [make(stream, tokens // setting.batch + 400, 1000 * seed + i) for i in range(setting.batch)]
    return Server(setting, streams, tokens)


def rule_of(setting, seed=0, scale=1.0, **kwargs):
    return CostAwareRule(cost_model(setting, seed, scale), DEPTH, **kwargs)


def rates(costs, stream, tokens=3000, **kwargs):
    server = server_of(costs, stream, tokens * (1 if SETTINGS[costs].batch == 1 else 4))
    rule = rule_of(server.setting, **kwargs)
    fixed = [server.planned(np.full(len(server.run), k)) for k in (0, 1, 2, 3, 5, 8)]
    return server.play(rule, 0).rate, fixed, server


@pytest.mark.parametrize(
    ("costs", "stream"),
    [
        ("paper", "markov"),
        pytest.param("cpu", "flat", marks=pytest.mark.slow),
        pytest.param("dear", "markov", marks=pytest.mark.slow),
        pytest.param("b64", "poor", marks=pytest.mark.slow),
    ],
)
def test_close_to_the_best_fixed_length_or_better(costs, stream):
    rate, fixed, _ = rates(costs, stream)
    assert rate > 0.95 * max(fixed)
    assert rate > 0.97 * fixed[0]


def test_the_oracle_drafts_what_will_be_accepted():
    """Three accepted, one not, over and over: four tokens for three draft passes and one verification."""
    server = Server(SETTINGS["paper"], [text([1.0, 1.0, 1.0, 0.0] * 100)], 380)
    assert server.planned(np.array(server.run)) == pytest.approx(4 / (3 * 0.023 + 0.109))


@pytest.mark.slow
def test_finds_its_way_back_after_a_workload_that_was_not_worth_drafting():
    rate, fixed, _ = rates("cpu", "shift", tokens=5000)
    assert rate > 1.02 * max(fixed)


@pytest.mark.parametrize("costs", ["paper", pytest.param("cpu_b4", marks=pytest.mark.slow)])
def test_drafting_that_never_pays_costs_next_to_nothing(costs):
    rate, fixed, _ = rates(costs, "poor", tokens=4000)
    assert rate > 0.98 * fixed[0] == 0.98 * max(fixed)


@pytest.mark.slow
def test_a_lagged_score_does_what_it_can():
    server = server_of("paper", "markov", 2500)
    late = server.play(rule_of(server.setting, lag=1), 0).rate
    fixed = max(server.planned(np.full(len(server.run), k)) for k in (0, 1, 2, 3, 5, 8))
    assert late > 1.02 * fixed  # a lagged score is worth something
    assert server.play(rule_of(server.setting), 0).rate > 1.01 * late  # and one in time worth more


@pytest.mark.slow
def test_the_informed_rule_is_the_better_for_what_it_knows():
    server = server_of("paper", "overconfident", 2000)
    costs = true_costs(server.setting)
    assert costs.round_seconds([1, 1], 3) == pytest.approx(server.setting.round([1, 1], 3))
    fixed = server.planned(np.full(len(server.run), 2))
    rate = informed_run(server, calibrated([make("overconfident", 2000, 99)]), fixed, fixed).rate
    assert rate > 1.02 * informed_run(server, AcceptanceModel(), fixed, fixed).rate
    assert rate > fixed


@pytest.mark.parametrize("costs", ["cpu_int8", "cpu_b4"])
def test_planned_rounds_cost_what_served_ones_do(costs):
    server = server_of(costs, "markov", 1500)
    assert server.planned(np.full(len(server.run), 3)) == pytest.approx(server.play(Planned(3), 0).rate)


def test_reading_is_paid_for_when_a_request_is_drafted_for():
    """Nothing is accepted. Two rounds without drafting, then two with: the third reads the prompt and two tokens."""
    rule = Planned(1, when=lambda number: number >= 2)
    run = Server(FLAT, [text([0.0] * 50, prompts=[21])], 4).play(rule, 0)
    assert [(s.behind, s.emitted) for (s,) in rule.seen] == [(20, 1), (21, 2), (22, 3), (0, 4)]
    assert run.seconds == pytest.approx([0, 1, 2, 3.1 + 0.22, 4.2 + 0.22])
    assert run.first_draft == 2 and run.drafted == 2


def test_what_was_accepted_while_drafting_need_not_be_read():
    rule = Planned(3, when=lambda number: number != 1)
    Server(FLAT, [text([1.0] * 50, prompts=[11])], 9).play(rule, 0)
    assert [(s.behind, s.emitted) for (s,) in rule.seen] == [(10, 1), (0, 5), (1, 6)]


def test_without_reading_nothing_is_ever_behind():
    rule = Planned(1, when=lambda number: number >= 2)
    server = Server(FLAT, [text([0.0] * 50, prompts=[21])], 4, reads=False)
    assert server.play(rule, 0).seconds[-1] == pytest.approx(4.2) and not any(s.behind for (s,) in rule.seen)
    assert server.planned(np.full(50, 1)) == pytest.approx(1 / 1.1)


def test_requests_end_where_their_text_does_and_the_rule_sees_only_a_bound():
    """Outputs of 4 and 6 tokens in turn, all accepted; at most 8 tokens each, the prefill's first one among them."""
    rule = Planned(3)
    server = Server(FLAT, [text([1.0] * 10, prompts=[5, 7], outputs=[4, 6], max_tokens=8)], 20)
    server.play(rule, 0)
    seen = [(s.request_id, s.room, s.limit, s.behind) for (s,) in rule.seen]
    assert seen[:3] == [("0-0-0", 6, 6, 4), ("0-0-1", 6, 6, 6), ("0-0-1", 2, 2, 0)]
    assert seen[3][0] == "0-1-0"  # the stream began anew
    outcomes = [(verified, accepted) for verified, accepted, _, _, _ in rule.finished]
    assert outcomes[:3] == [([None], [3]), ([3], [3]), ([None], [1])]  # of one that ended nothing is known
    assert [timed is None for *_, timed, _ in rule.finished[:3]] == [True, False, True]  # a prompt was in that step


def test_a_round_ends_with_its_request():
    server = Server(FLAT, [text([1.0] * 10, outputs=[4, 6], prompts=[1, 1])], 10)
    assert server.run == [3, 2, 1, 0, 5, 4, 3, 2, 1, 0]
    assert server.play(Planned(16), 0).tokens == [0, 4, 10]


def test_a_served_mix_waits_for_a_free_place():
    """Two places, three requests of two tokens at once; no drafting. The target's prefill takes what it is set to."""
    setting = Setting(lambda b: 0.1, lambda b: 0.1, lambda n: 1.0, 2, per_read=0.01)
    stream = text([0.0] * 6, prompts=[10, 20, 30], outputs=[2, 2, 2])
    run = Server(setting, [stream], 6).play(Off(), 0, [0.0, 0.0, 0.0])
    prefill = [setting.prefill(tokens) for tokens in (30, 30)]
    assert prefill[0] == pytest.approx(0.01 * 30 / 0.1)
    first = 1 + prefill[0]
    assert run.to_first == pytest.approx([first, first, first + 2 + 1 + prefill[1]])
    assert [(seconds, tokens) for _, seconds, tokens in run.per_token] == [(pytest.approx(2.0), 2)] * 3


def test_requests_that_arrive_late_are_waited_for():
    run = Server(FLAT, [text([0.0] * 4, prompts=[1, 1], outputs=[2, 2])], 4).play(Off(), 0, [5.0, 50.0])
    assert run.seconds[-1] == pytest.approx(50 + 1 + FLAT.prefill(1) + 2)
    assert run.to_first == pytest.approx([1 + FLAT.prefill(1)] * 2)


def test_nobody_is_served_before_he_arrives():
    """Two places; the second request comes while the first, of 20 tokens, is served, and joins the round at hand."""
    setting = Setting(lambda b: 0.1, lambda b: 0.1, lambda n: 1.0, 2, per_read=0.0)
    run = Server(setting, [text([0.0] * 22, prompts=[1, 1], outputs=[20, 2])], 22).play(Off(), 0, [0.0, 10.5])
    assert run.to_first == pytest.approx([1.0, 1.5])


def in_turn(served):
    """(id, rounds in a row) of each request of one place in the batch."""
    turns = [(name, len(list(rounds))) for name, rounds in groupby(served)]
    assert len({name for name, _ in turns}) == len(turns)  # an id never comes back
    return turns


def test_every_prompt_of_each_place_in_the_batch_is_a_new_request():
    """Nothing is accepted: a token a round. Text that begins again is new requests, too."""
    rule = Planned(0)
    stream = text(np.zeros(300), prompts=[9, 9, 9], outputs=[128, 128, 44])
    Server(SETTINGS["cpu_b4"], [stream] * 4, 4 * 700).play(rule, 0)
    places = list(zip(*([s.request_id for s in standings] for standings in rule.seen), strict=True))
    assert len(places) == 4 and not any(set(a) & set(b) for a in places for b in places if a is not b)
    assert all([num for _, num in in_turn(place)] == [128, 128, 44, 128, 128, 44, 100] for place in places)


def rich_and_poor(num, seed):
    """Requests by turns: 19 of 20 candidates accepted, or 2 of 5; the scores are right but for some noise."""
    rng = np.random.default_rng(seed)
    mean = np.where(np.arange(num) // 128 % 2 == 0, 0.95, 0.4)
    p = 1 / (1 + np.exp(-(np.log(mean / (1 - mean)) + rng.normal(0, 0.5, num))))
    starts = np.append(np.arange(0, num, 128), num)
    return requests((rng.random(num) < p).astype(float), p, starts, np.full(len(starts) - 1, 16), 256)


def test_poor_prompts_between_rich_ones_are_drafted_where_that_beats_no_drafting():
    """A candidate of a poor prompt brings less than rho, but 8 % more than K = 0."""
    setting, gains = SETTINGS["one_core"], []
    for seed in range(2):
        server = Server(setting, [rich_and_poor(2000, seed)], 2000)
        rate = server.play(rule_of(setting, seed), seed).rate
        gains.append(rate / max(server.planned(np.full(len(server.run), k)) for k in range(5)))
    assert np.mean(gains) > 1.05


def test_costs_measured_wrong_by_half_are_put_right():
    rate, fixed, _ = rates("paper", "markov", scale=1.5)
    assert rate > max(fixed)


@pytest.mark.slow
def test_without_calibration_overconfident_scores_cost():
    live, _, _ = rates("paper", "overconfident", 1500)
    frozen, _, _ = rates("paper", "overconfident", 1500, adapt=False)
    assert live > 1.02 * frozen


def test_the_engine_reads_no_prompt_for_an_output_that_cannot_win_it_back():
    """A prompt of 2,000 tokens takes 3 s to read, the outputs are short."""
    setting = SETTINGS["cpu"]
    stream = text([1.0] * 400, prompts=[2000] * 40, outputs=[10] * 40, max_tokens=12)
    assert Server(setting, [stream], 400).play(rule_of(setting), 0).drafted == 0
    cheap = text([1.0] * 400, prompts=[2] * 40, outputs=[10] * 40, max_tokens=12)
    assert Server(setting, [cheap], 400).play(rule_of(setting), 0).drafted > 200


def test_a_warm_rule_meets_new_requests(monkeypatch):
    """It has served other text, and no request of it comes back."""
    rule = Planned()
    monkeypatch.setitem(simulate.RULES, "planned", lambda costs: rule)
    options = simulate.make_parser().parse_args(["--rule", "planned", "--tokens", "600", "--warm-tokens", "500"])
    options.starts = ["warm"]
    simulate.measure("paper", "poor", options)
    ids = [s.request_id for standings in rule.seen for s in standings]
    assert ids[0].startswith("earlier-") and not ids[-1].startswith("earlier-")
    in_turn(ids)


def test_a_restored_rule_knows_how_often_the_other_was_right():
    server = server_of("paper", "poor", 1500)
    rule = rule_of(server.setting)
    server.play(rule, 0)
    other = rule_of(server.setting)
    assert other.restore(json.loads(json.dumps(rule.state())))
    mean = rule.admission.records.mean
    assert other.admission.records.mean == mean < 0.5 < rule_of(server.setting).admission.records.mean
    assert server.play(other, 0).drafted < server.play(rule_of(server.setting), 0).drafted


def test_regret_is_what_the_best_in_hindsight_would_have_saved():
    """As fast from token 2,000 on, a tenth slower before; one window of 500 tokens in which nothing came for 50 s."""
    best = Run([0, 6000], [0.0, 600.0])
    slow = Run([0, 2000, 6000], [0.0, 220.0, 620.0])
    lost = regret(slow, best, 1)
    assert (lost.first, lost.after, lost.tried) == pytest.approx((1 - 200 / 220, 0.0, 0.0))
    assert lost.worst == pytest.approx(1 - 50 / 55)
    assert regret(best, best, 1).worst == 0
    trials = [(100, 30.0, 1), (3000, 50.1, 1)]  # the first is of the start
    hole = Run([0, 3000, 3001, 6000], [0.0, 300.0, 350.1, 650.0], trials=trials)
    lost = regret(hole, best, 1)
    assert lost.worst == pytest.approx(0.5) and lost.first == 0
    assert lost.tried == pytest.approx(50 / 450) == pytest.approx(lost.after)
    assert curve(slow, best)[1][-1] == pytest.approx(1 - 600 / 620)
    assert regret(slow, best, 64).first == pytest.approx(1 - 600 / 620)  # of a batch of 64 by 6,000 tokens


def test_in_hindsight_only_the_requests_that_gain_are_drafted_for():
    setting = SETTINGS["dear"]
    server = Server(setting, [rich_and_poor(4000, 0)], 3900)
    informed = server.play(Informed(true_costs(setting), calibrated([rich_and_poor(4000, 1)]), 12.0), 0)
    assert simulate.chosen(server, informed) > 1.02 * max(informed.rate, 1 / 0.109)


ABLATED = [*simulate_ablation.MECHANISMS, "records._OWN/2", "purse._SHARE*2"]


@pytest.mark.parametrize(
    ("costs", "stream", "names"),
    [("cpu_b4", "shift", ["spread"]), ("cpu_int8_busy", "mixed", [name for name in ABLATED if name != "spread"])],
)
def test_what_was_taken_out_is_missed_and_then_put_back(costs, stream, names):
    """Each changes what becomes of the same requests, and leaves nothing behind."""
    server = server_of(costs, stream, 2000)
    before = simulate_ablation.play(server, 0, ()).rate
    for name in names:
        assert simulate_ablation.play(server, 0, (name,)).rate != before, name
    assert simulate_ablation.play(server, 0, ()).rate == before


def test_every_constant_of_who_drafts_can_be_moved():
    for constant in simulate_ablation.CONSTANTS:
        module, name = simulate_ablation.where(constant)
        before = getattr(module, name)
        with simulate_ablation.changed([f"{constant}*2"]):
            assert getattr(module, name) != before
        assert getattr(module, name) == before


def test_the_ablation_writes_a_table(tmp_path, capsys):
    out = tmp_path / "x.jsonl"
    command = ["--costs", "paper", "--streams", "markov", "poor", "--tokens", "200", "--seeds", "2", "--out", str(out)]
    assert simulate_ablation.main([*command, "--without", "calibration", "own", "--constants", "records._OWN"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["stream"] for row in rows] == ["markov", "poor"]
    assert rows[0]["changed"]["calibration"] != rows[0]["rates"] and len(rows[0]["rates"]) == 2
    page = out.with_suffix(".md").read_text()
    assert "| −calibration |" in page and "| records._OWN |" in page
    assert simulate_ablation.main(command) == 2 and "--force" in capsys.readouterr().err
    for option in ("--without", "--constants"):
        assert simulate_ablation.main([*command, "--force", option, "nonsense"]) == 2
        assert "nonsense" in capsys.readouterr().err


def test_a_start_without_slow_moments_times_every_width_about_right(capsys):
    setting = SETTINGS["cpu_b4"]

    def dearest(often_slow: float) -> float:
        costs = cost_model(setting, 0, often_slow=often_slow)
        return max(costs.step.at(width) / setting.step(width) for width in range(1, setting.batch + 1))

    assert dearest(0.0) < 1.2 < 1.4 < dearest(1.0)
    assert simulate.main(["--slow", "2"]) == 2 and "--slow 2.0 must be" in capsys.readouterr().err
