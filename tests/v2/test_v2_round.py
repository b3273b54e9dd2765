# SPDX-License-Identifier: Apache-2.0
"""The device's round takes the decisions of the host's, step by step, for every rule, head and feature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllm_specdecpp.decision.estimator import ConfidenceEstimator, EntropyEstimator, HeadEstimator
from vllm_specdecpp.decision.features import SCALAR_FEATURES, features_from_logits
from vllm_specdecpp.decision.round import DraftRound
from vllm_specdecpp.decision.rules import FixedRule, ThresholdRule
from vllm_specdecpp.head.model import AcceptanceHead

HIDDEN, VOCAB, MAX_LENGTH = 8, 40, 6
STOP = 3


def _head(**options: Any) -> AcceptanceHead:
    torch.manual_seed(4)
    head = AcceptanceHead(HIDDEN, 2, **options)
    with torch.no_grad():
        head.output.weight.mul_(4.0)
        head.output.bias.copy_(torch.tensor([0.0, 1.5]))
    return head.eval()


RULES: dict[str, Callable[[], Any]] = {
    "fixed": lambda: FixedRule(),
    "confidence": lambda: ThresholdRule(ConfidenceEstimator(), 0.8),
    "entropy": lambda: ThresholdRule(EntropyEstimator(), 0.9),
    "the paper's head": lambda: ThresholdRule(HeadEstimator(_head()), 0.6),
    "look-ahead head": lambda: ThresholdRule(HeadEstimator(_head(lag=0, features=("top1_prob", "margin"))), 0.6),
    "with all features": lambda: ThresholdRule(HeadEstimator(_head(lag=0, features=SCALAR_FEATURES)), 0.6),
}


def _pass(step: int, num_reqs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    logits = torch.randn(num_reqs, VOCAB, generator=generator) * 4
    hidden_states = torch.randn(num_reqs, HIDDEN, generator=generator)
    if step == 2:
        hidden_states[-1] = torch.nan  # a broken head ends a draft, not the server
    token_ids = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
    return logits, hidden_states, token_ids


@pytest.mark.parametrize("min_length", [1, 3])
@pytest.mark.parametrize("name", RULES)
@torch.no_grad()
def test_decisions_equal_the_hosts(name, min_length):
    from vllm_specdecpp.engine.v2.requests import COLUMNS
    from vllm_specdecpp.engine.v2.round import DeviceRound

    num_reqs, max_num_reqs = 40, 44
    rule = RULES[name]()
    device = DeviceRound(torch.full((max_num_reqs, MAX_LENGTH), -7), torch.empty(max_num_reqs, MAX_LENGTH))
    device.set_rule(rule, min_length)
    device.limits[:, 0] = torch.arange(max_num_reqs) % (MAX_LENGTH + 1)
    device.limits[:, 1] = 1000
    device.limits[:, 2:] = -1
    device.limits[::2, 2 + (COLUMNS - 3)] = STOP
    seq_lens = torch.full((max_num_reqs,), 20, dtype=torch.int32)
    device.start(num_reqs, seq_lens, torch.zeros_like(seq_lens), torch.ones_like(seq_lens))
    state = DraftRound(
        rule, device.limits[:num_reqs, 0], min_length=min_length, stop_token_ids=device.limits[:num_reqs, 2:]
    )
    for step in range(1, MAX_LENGTH + 1):
        logits, hidden_states, token_ids = _pass(step, num_reqs)
        ran = state.running.bool()
        state.observe(features_from_logits(logits, hidden_states))
        state.append(token_ids)
        device.observe_pass(step, logits, hidden_states)
        column = device.append_drawn(token_ids)
        assert column.tolist() == torch.where(ran, token_ids, -1).tolist()
        assert device.running[:num_reqs].tolist() == state.running.tolist()
        torch.testing.assert_close(device.survival[:num_reqs], state.survival, rtol=1e-5, atol=1e-7)
        assert bool(device.any_running) == bool(state.any_running) == state.goes_on()
        _check_confidences(device, step, ran)
    assert device.lengths[:num_reqs].tolist() == state.lengths.tolist()
    assert len(set(state.lengths.tolist())) >= 4
    assert (device.draft_tokens[num_reqs:] == -7).all()


def _check_confidences(device: Any, step: int, ran: torch.Tensor) -> None:
    """vLLM's adaptive verification multiplies them up: 0 where no candidate is, else what was known before its draw,
    and with a lag before the next one's."""
    confidences = device.confidences[: len(ran), step - 1]
    assert (confidences[~ran] == 0).all()
    if device.rule.estimator is not None:
        survival = device.confidences[: len(ran), : step - device.rule.estimator.lag].prod(dim=1)
        torch.testing.assert_close(survival[ran], device.survival[: len(ran)][ran], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("seq_len", "rejected", "sampled", "cap", "end", "wanted"),
    [
        (20, 0, 1, 6, 100, 6),
        (20, 0, 0, 6, 100, 0),  # a prompt in chunks: nothing was sampled
        (20, 4, 1, 6, 24, 6),  # tokens 0..15 stay, 16 was emitted: 7 may follow, one of them the target's
        (20, 4, 1, 6, 23, 5),
        (20, 4, 1, 6, 18, 0),
        (20, 4, 1, 6, 10, 0),  # past its end, as asynchronous scheduling may run it
        (20, 0, 3, 0, 100, 0),
    ],
)
def test_longest_draft(seq_len, rejected, sampled, cap, end, wanted):
    from vllm_specdecpp.engine.v2.round import DeviceRound

    device = DeviceRound(torch.zeros(3, 8, dtype=torch.int64))
    device.limits[:, 0], device.limits[:, 1] = cap, end

    def column(value: int) -> torch.Tensor:
        return torch.full((3,), value, dtype=torch.int32)

    device.start(2, column(seq_len), column(rejected), column(sampled))
    assert device.max_lengths.tolist() == [wanted, wanted, 0]
    assert device.next_positions.tolist() == [seq_len - rejected, seq_len - rejected, 0]
    assert device.running.tolist() == [int(wanted > 0)] * 2 + [0]
