# SPDX-License-Identifier: Apache-2.0
"""The engine's default rule on recorded rounds: against the rule run on the process that was recorded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.recorded_process import HIDDEN, Process, chains_of, record
from vllm_specdecpp.costs.model import CostModel
from vllm_specdecpp.decision.cost_aware.rule import CostAwareRule, Standing
from vllm_specdecpp.head.files import Calibration
from vllm_specdecpp.head.model import AcceptanceHead
from vllm_specdecpp.training.replay.cost_aware import cost_aware_lengths
from vllm_specdecpp.training.replay.replay import Lengths, fixed_lengths, oracle_lengths, walk

RECORDED, BOUND = 24, 8
CHEAP = CostModel({1: 0.02}, {1: 0.08 / 7}, {1: 0.20, 2: 0.20, 9: 0.22})
DEAR = CostModel({1: 0.15}, {1: 0.15}, {1: 0.10, 2: 0.20, 9: 0.60})


def make_head(lag: int) -> AcceptanceHead:
    """Reads the confidence that the recorded states hold; its calibration differs by position."""
    torch.manual_seed(1)
    head = AcceptanceHead(HIDDEN, 0, lag=lag)
    with torch.no_grad():
        head.output.weight.zero_()
        head.output.weight[1, 0] = 1.5
    head.calibration = Calibration(slope=1.0, intercepts=[1.0, 0.3, -0.2])
    return head


def served(processes: list[Process], costs: CostModel, head: AcceptanceHead | None) -> list[list[tuple[int, int]]]:
    """Candidates and draft passes of every round, prompt by prompt, with the rule drafting on the processes."""
    lag = head.lag if head else 0
    rule = CostAwareRule(CostModel(**costs.points(), max_reqs=1, max_tokens=BOUND + 1), BOUND, lag=lag)
    found: list[list[tuple[int, int]]] = []
    for number, process in enumerate(processes):
        rounds: list[tuple[int, int]] = []
        place = 0
        while place < process.num_tokens:
            left = process.num_tokens - place
            round_ = rule.begin([Standing(str(number), min(BOUND, left - 1), left, behind=0, emitted=place + 1)])
            while round_.running[0]:
                drawn = len(round_.widths)
                step = process.step(place, drawn)
                score = None
                if head is None:
                    score = step["top1_prob"]
                elif drawn >= lag:
                    with torch.no_grad():
                        score = float(head.probability(step["hidden_states"][None], position=drawn + 1 - lag))
                round_.step(None if score is None else np.array([score]))
            length, accepted = int(round_.lengths[0]), 0
            while accepted < length and process.matches[place + accepted]:
                accepted += 1
            passes = len(round_.widths)
            rule.finish(round_, [length], [accepted], costs.draft_seconds([1] * passes), costs.verify.at(length + 1))
            rounds.append((length, passes))
            place += accepted + 1
        found.append(rounds)
    return found


@pytest.mark.parametrize("costs", [CHEAP, DEAR], ids=["cheap", "dear"])
@pytest.mark.parametrize("lag", [None, 0, 1])
def test_as_on_the_process(costs: CostModel, lag: int | None) -> None:
    processes = [Process(200, 0.7, seed) for seed in range(4)]
    head = None if lag is None else make_head(lag)
    chains = chains_of(record(processes, RECORDED), RECORDED, head)
    found = walk(chains, cost_aware_lengths(chains, costs, head, BOUND), costs)
    expected = served(processes, costs, head)
    lengths = {length for rounds in expected for length, _ in rounds}
    assert len(lengths) > 3 if costs is CHEAP else 0 in lengths
    for i, rounds in enumerate(expected):
        assert int(found.rounds[i]) == len(rounds)
        assert int(found.candidates[i]) == sum(length for length, _ in rounds)
        seconds = sum(costs.draft_seconds([1] * passes) + costs.verify.at(length + 1) for length, passes in rounds)
        assert float(found.seconds[i]) == pytest.approx(seconds)


@pytest.mark.parametrize("lag", [None, 0])
def test_it_goes_on_from_what_it_has_served(lag: int | None) -> None:
    processes = [Process(200, 0.7, seed) for seed in range(4)]
    head = None if lag is None else make_head(lag)
    before, after = (chains_of(record(part, RECORDED), RECORDED, head) for part in (processes[:3], processes[3:]))
    found = walk(after, cost_aware_lengths(after, CHEAP, head, BOUND, before), CHEAP)
    warm, cold = served(processes, CHEAP, head)[3], served(processes[3:], CHEAP, head)[0]
    assert warm != cold
    assert int(found.rounds[0]) == len(warm)
    assert int(found.candidates[0]) == sum(length for length, _ in warm)


def test_it_drafts_where_that_pays_and_hardly_where_not() -> None:
    processes = [Process(400, 0.8, seed) for seed in range(4)]
    chains = chains_of(record(processes, RECORDED), RECORDED)
    for costs in (CHEAP, DEAR):
        rate = walk(chains, cost_aware_lengths(chains, costs, None, BOUND), costs).tokens_per_second()
        fixed = {k: walk(chains, fixed_lengths(chains, k), costs).tokens_per_second() for k in range(BOUND + 1)}
        best = max(fixed, key=lambda k: fixed[k])
        assert (best == 0) == (costs is DEAR)
        assert rate > 0.97 * fixed[best]
        assert rate <= walk(chains, oracle_lengths(chains, costs, BOUND), costs).tokens_per_second()


def test_a_pass_whose_candidate_is_not_submitted_takes_its_time() -> None:
    chains = chains_of(record([Process(50, 0.7, 0)], RECORDED), RECORDED)
    lengths = fixed_lengths(chains, 2)
    more = Lengths(lengths.candidates, lengths.cut, lengths.candidates + 1)
    plain, found = walk(chains, lengths, CHEAP), walk(chains, more, CHEAP)
    assert torch.equal(plain.candidates, found.candidates)
    draft: Any = [CHEAP.draft_seconds([1] * k) for k in range(4)]
    extra = sum(draft[k + 1] - draft[k] for k in _visited(chains, lengths))
    assert float(found.seconds[0] - plain.seconds[0]) == pytest.approx(extra)


def _visited(chains: Any, lengths: Lengths) -> list[int]:
    """Candidate lengths of the rounds of a single prompt."""
    here = 0
    found: list[int] = []
    while here < chains.num_starts:
        length = int(lengths.candidates[here])
        found.append(length)
        here += min(length, int(chains.run[here])) + 1
    return found
