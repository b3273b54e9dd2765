# SPDX-License-Identifier: Apache-2.0
"""Sampled output follows the target's law when some requests of a batch draft, some of them go on with a run, some
take runs alone and some do nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.exact_law import p_value
from tests.v2.run_rounds import quicker_runs
from tests.v2.test_v2_lossless import FAILS_BELOW, LENGTH, VOCAB, _Given, _law, verified
from vllm_specdecpp.decision.cost_aware.tail import CostAwareTail
from vllm_specdecpp.decision.sources.suffix import longest_match
from vllm_specdecpp.engine.v2.free_runs import DeviceFreeRuns
from vllm_specdecpp.engine.v2.round import DeviceRound
from vllm_specdecpp.kernels.one_hot_rows import one_hot_rows_torch

NUM_REQS = 4000
TEXT = 9
"""Tokens of each request."""


class Batch:
    """A round in which every second request drafts, as ``draft`` [LENGTH, VOCAB] says or its likeliest tokens."""

    def __init__(self, draft: torch.Tensor, probabilistic: bool, plant: Any = None) -> None:
        often = torch.tensor([5.0, *[1.0] * (VOCAB - 1)])  # the first token stands in most runs
        table = torch.multinomial(often, NUM_REQS * (TEXT + LENGTH), replacement=True).int().view(NUM_REQS, -1)
        shape = NUM_REQS, LENGTH
        device = DeviceRound(torch.zeros(shape, dtype=torch.int64), torch.zeros(shape))
        states = torch.randperm(NUM_REQS)
        self.speculator = SimpleNamespace(
            max_num_reqs=NUM_REQS + 1, num_speculative_steps=LENGTH, device="cpu", agree=lambda tensor: tensor,
            requests=(),
            draft_logits=torch.randn(NUM_REQS, LENGTH, VOCAB) if probabilistic else None, round=device,
            runner=SimpleNamespace(req_states=SimpleNamespace(all_token_ids=SimpleNamespace(gpu=table))),
        )  # fmt: skip
        self.runs = DeviceFreeRuns(self.speculator)
        quicker_runs(self.runs)
        if plant is not None:
            plant(self.runs)
        given: Any = _Given()
        tail = CostAwareTail(given, NUM_REQS, LENGTH, 4 * NUM_REQS, "cpu")
        device.set_rule(tail, 1)
        device.limits[::2, 0], device.limits[1::2, 0] = LENGTH, torch.randint(0, LENGTH + 1, (NUM_REQS // 2,))
        device.limits[:, 1], device.limits[:, 2:] = 100, -1
        ones = torch.ones(NUM_REQS, dtype=torch.int32)
        device.start(NUM_REQS, ones * (TEXT - 1), ones * 0, ones)
        self.drafts = torch.arange(NUM_REQS) % 2 == 0
        most = len(tail.params.bucket_of)
        tail.params.load(
            limits=np.where(self.drafts, torch.randint(1, LENGTH + 1, (NUM_REQS,)), 0), price=0.0,
            this=[1.0] + [0.0] * most, next=[1.0] + [0.0] * most,
            means=[0.6] * most, step_seconds=[1e-3] * (NUM_REQS + 1),
            verify_seconds=1 + 1e-5 * np.arange(4 * NUM_REQS + 1), runs=[1.9, -1.0] + [0.0] * most,
        )  # fmt: skip
        device.admit()
        batch = SimpleNamespace(num_reqs=NUM_REQS, idx_mapping=states, req_ids=list(map(str, range(NUM_REQS))))
        self.runs.verified(batch, ones)
        self.runs.find(batch, tail)
        for step, q in enumerate(draft, 1):
            logits = q.repeat(NUM_REQS, 1)
            drawn = torch.multinomial(q.softmax(-1), NUM_REQS, replacement=True) if probabilistic else logits.argmax(1)
            given.scores = torch.full((NUM_REQS,), 0.9)
            device.observe_pass(step, logits, logits)
            device.append_drawn(drawn)
            if self.speculator.draft_logits is not None:  # vLLM keeps those of all rows
                self.speculator.draft_logits[:, step - 1] = q
        self.drafted = device.lengths.clone()
        self.runs.follow(tail)
        self.runs.submit()
        self.states, self.table, self.round = states, table, device

    def emitted(self, target: torch.Tensor) -> list[tuple[int, ...]]:
        """Of drafts that vLLM is told nothing of, that they are certain."""
        candidates, logits = self.round.draft_tokens, self.speculator.draft_logits
        if logits is None:
            certain = torch.nn.functional.one_hot(candidates.clamp(min=0), VOCAB)
            return verified(target, certain.log(), candidates)
        return verified(target, logits[self.states], candidates)


@pytest.mark.parametrize("probabilistic", [False, True])
def test_any_mix_follows_the_law(probabilistic):
    torch.manual_seed(3)
    target, draft = torch.randn(LENGTH + 1, VOCAB), torch.randn(LENGTH, VOCAB)
    batch = Batch(draft, probabilistic)
    run = ~batch.drafts & (batch.round.lengths > 0)
    behind = (batch.drafted > 0) & (batch.round.lengths > batch.drafted)
    assert min(int(run.sum()), int((batch.drafted > 0).sum())) > 1000 and int(behind.sum()) > 500
    assert p_value(batch.emitted(target), _law(target)) > FAILS_BELOW
    if probabilistic:  # a draft's rows are the draft's still, and those behind it certain
        for row in behind.nonzero().flatten().tolist():
            size, logits = int(batch.drafted[row]), batch.speculator.draft_logits[batch.states[row]]
            own = batch.round.draft_tokens[row, size : int(batch.round.lengths[row])]
            assert torch.equal(logits[:size], draft[:size])
            assert torch.equal(logits[size:].softmax(-1)[: len(own)], torch.nn.functional.one_hot(own, VOCAB).float())
    for row in run.nonzero().flatten().tolist()[:40] + behind.nonzero().flatten().tolist()[:40]:
        size = int(batch.drafted[row])
        drafted, candidates = batch.round.draft_tokens[row].split([size, LENGTH - size])
        text = np.append(batch.table[batch.states[row], :TEXT].numpy(), drafted.numpy())
        length = int(batch.round.lengths[row]) - size
        start, match = longest_match(text)
        again = np.resize(text[start:], length).tolist()
        assert candidates.tolist() == again + [-1] * (LENGTH - size - length)
        # What vLLM's adaptive verification sizes the verification by.
        chances = 1 / (1 + np.exp(1 - 1.9 * np.log(match + np.arange(length))))
        assert batch.round.confidences is not None
        assert batch.round.confidences[row, size : size + length].tolist() == pytest.approx(chances.tolist(), rel=1e-5)


def _not_certain(runs: Any) -> None:
    runs.make_certain = lambda *args: None


def _certain_of_another(runs: Any) -> None:
    original = runs.make_certain
    runs.make_certain = lambda logits, states, ids: original(
        logits, states, torch.where(ids < 0, -1, (ids + 1) % VOCAB)
    )


def _certain_in_another_row(runs: Any) -> None:
    original = runs.make_certain
    runs.make_certain = lambda logits, states, ids: original(logits, states.roll(1), ids)


def _certain_one_step_early(runs: Any) -> None:
    original = runs.make_certain
    runs.make_certain = lambda logits, states, ids: original(logits, states, ids.roll(-1, dims=1))


@pytest.mark.parametrize(
    "plant",
    [
        _not_certain, _certain_of_another, _certain_in_another_row, _certain_one_step_early,
    ],
)  # fmt: skip
def test_wrong_draft_logits_are_noticed(plant):
    torch.manual_seed(3)
    target, draft = torch.randn(LENGTH + 1, VOCAB), torch.randn(LENGTH, VOCAB)
    assert p_value(Batch(draft, True, plant).emitted(target), _law(target)) < FAILS_BELOW


@pytest.mark.parametrize("block", [False, True], ids=["standard", "block"])
def test_vllm_verifies_one_hot_rows_as_certain_candidates(block):
    """Its kernels with our rows emit what they emit when told that all candidates are certain."""
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample

    torch.manual_seed(2)
    num_reqs, width = 40, LENGTH + 1
    ids = torch.randint(0, VOCAB, (num_reqs, LENGTH))
    target = torch.randn(num_reqs, width, VOCAB)
    target[:, :LENGTH].scatter_(2, ids[:, :, None], 2.0)
    target = target.view(-1, VOCAB)
    target[::3, 1] = -torch.inf  # what a request's top-k leaves out
    ids[::4, 1] = -1
    states = torch.randperm(num_reqs)
    logits = torch.randn(num_reqs, LENGTH, VOCAB)
    one_hot_rows_torch(logits, states, ids)
    sampled = []
    for draft_logits in (logits, None):
        tokens, counts = rejection_sample(
            target.clone(), draft_logits, torch.cat([torch.zeros(num_reqs, 1, dtype=torch.int64), ids], dim=1).view(-1),
            torch.arange(num_reqs + 1, dtype=torch.int32) * width, torch.arange(width).repeat(num_reqs), states,
            states.repeat_interleave(width), torch.arange(width, dtype=torch.int32).repeat(num_reqs),
            torch.full((num_reqs,), 0.7), torch.arange(num_reqs) + 5, LENGTH, use_block_verification=block,
        )  # fmt: skip
        sampled.append([row[:n] for row, n in zip(tokens.tolist(), counts.tolist(), strict=True)])
    assert sampled[0] == sampled[1] and {len(row) for row in sampled[0]} == {1, 2, 3}
