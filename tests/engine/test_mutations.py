# SPDX-License-Identifier: Apache-2.0
"""Planted bugs in the proposer: each changes some round, and none changes the greedy output.

So the comparison of rounds (``test_parity.py``) guards the drafter, and identical output cannot.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests import engine_harness as harness
from tests.planted_bugs import Bugs, change_result
from tests.reference_loop import Rule, generate, load_head
from vllm_specdecpp.engine.v1 import proposer as v1
from vllm_specdecpp.engine.v1.inputs import PADDING_SLOT_ID, DraftInputs, DraftKV

THRESHOLD = 0.8
MAX_LENGTH = 8
MAX_TOKENS = 32
PROMPTS = harness.prompts(12, seed=21)[4:10]
"""Three of them see EOS within a draft."""
STOP_IDS = frozenset({2})

MUTATIONS = Bugs()
"""Each is given pytest's monkeypatch and the engine's proposer."""
mutation = MUTATIONS.named


def _change_pass(monkeypatch: Any, name: str, change: Callable[[DraftInputs], dict[str, Any]]) -> None:
    """Replace fields of the input of the first or of the later draft passes."""

    def changed(result: Any, *_: Any) -> Any:
        if isinstance(result, list):  # the first pass, and what was split off it
            return [dataclasses.replace(inputs, **change(inputs)) for inputs in result]
        return dataclasses.replace(result, **change(result))

    change_result(monkeypatch, v1, name, changed)


def _roll(rows: torch.Tensor) -> torch.Tensor:
    return rows.roll(1, dims=0)


@mutation("wrong candidate submitted")
def _(monkeypatch, drafter):
    change = lambda drafts, *_: [[t + (i == 1) * (1 if t < 100 else -1) for i, t in enumerate(d)] for d in drafts]  # noqa: E731
    change_result(monkeypatch, drafter, "propose", change)


@mutation("wrong candidate fed back")
def _(monkeypatch, drafter):
    _change_pass(monkeypatch, "decode_pass", lambda inputs: {"token_ids": (inputs.token_ids + 1) % 512})


@mutation("wrong next token in the first pass")
def _(monkeypatch, drafter):
    def change(inputs):
        token_ids = inputs.token_ids.clone()
        token_ids[inputs.last_indices] = (token_ids[inputs.last_indices] + 1) % 512
        return {"token_ids": token_ids}

    _change_pass(monkeypatch, "first_pass", change)


@mutation("position one too high in later passes")
def _(monkeypatch, drafter):
    _change_pass(monkeypatch, "decode_pass", lambda inputs: {"positions": inputs.positions + 1})


@mutation("position one too low in the first pass")
def _(monkeypatch, drafter):
    _change_pass(monkeypatch, "first_pass", lambda inputs: {"positions": (inputs.positions - 1).clamp(min=0)})


@mutation("attention misses the newest token")
def _(monkeypatch, drafter):
    _change_pass(monkeypatch, "decode_pass", lambda inputs: {"seq_lens": inputs.seq_lens - 1})


@mutation("draft KV of candidates not written")
def _(monkeypatch, drafter):
    change = lambda inputs: {"slot_mapping": torch.full_like(inputs.slot_mapping, PADDING_SLOT_ID)}  # noqa: E731
    _change_pass(monkeypatch, "decode_pass", change)


@mutation("stale KV: the last candidate of an early stop is never read")
def _(monkeypatch, drafter):
    original = DraftKV.replace
    late = lambda self, rows, num_fed, blocks: original(self, rows, [n and n + 1 for n in num_fed], blocks)  # noqa: E731
    monkeypatch.setattr(DraftKV, "replace", late)


@mutation("stale KV: a rejected candidate's entry is kept")
def _(monkeypatch, drafter):
    original = DraftKV.first_missing

    def kept(self: DraftKV, row: Any, blocks: Any) -> int:
        entry = self._entries.get(row.request_id)
        fed_to = entry[1] if entry is not None and entry[0] == row.first_query_position else 0
        start = original(self, row, blocks)
        # Where the recovered token stands, the rejected candidate's KV is taken for good.
        return start if fed_to <= row.next_position else row.next_position

    def not_written(passes, rows, *_):
        (inputs,) = passes
        slot_mapping = inputs.slot_mapping.clone()
        for index, row in enumerate(rows):
            entry = drafter.draft_kv._entries.get(row.request_id)
            if entry is not None and entry[0] == row.first_query_position and entry[1] > row.next_position:
                slot_mapping[inputs.last_indices[index]] = PADDING_SLOT_ID
        return [dataclasses.replace(inputs, slot_mapping=slot_mapping)]

    monkeypatch.setattr(DraftKV, "first_missing", kept)
    change_result(monkeypatch, v1, "first_pass", not_written)


@mutation("length one too short")
def _(monkeypatch, drafter):
    change = lambda drafts, *_: [d[:-1] if len(d) > 1 else d for d in drafts]  # noqa: E731
    change_result(monkeypatch, drafter, "propose", change)


class _LateRule:
    """Stops on the survival of the step before: one candidate too many."""

    def __init__(self, rule: Any) -> None:
        self._rule = rule
        self._last: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rule, name)

    def should_stop(self, survival: torch.Tensor, num_drawn: int) -> torch.Tensor:
        last = self._last if num_drawn and self._last is not None else torch.ones_like(survival)
        self._last = survival
        return self._rule.should_stop(last, num_drawn)


@mutation("length one too long")
def _(monkeypatch, drafter):
    monkeypatch.setattr(drafter, "rule", _LateRule(drafter.rule))


@mutation("head scores the candidate itself: no lag")
def _(monkeypatch, drafter):
    monkeypatch.setattr(drafter.rule.estimator, "lag", 0)


@mutation("upper bound one too low")
def _(monkeypatch, drafter):
    change_result(monkeypatch, drafter.requests, "max_length", lambda bound, *_: max(bound - 1, 0))


@mutation("EOS does not end a draft")
def _(monkeypatch, drafter):
    monkeypatch.setattr(drafter.requests, "stop_token_ids", lambda rows: None)


@mutation("requests swapped: candidates")
def _(monkeypatch, drafter):
    change_result(monkeypatch, drafter, "propose", lambda drafts, *_: drafts[-1:] + drafts[:-1])


@mutation("requests swapped: blocks read by later passes")
def _(monkeypatch, drafter):
    original = drafter._run_draft_model

    def swapped(inputs, block_table, draft_index):
        return original(inputs, _roll(block_table) if draft_index else block_table, draft_index)

    monkeypatch.setattr(drafter, "_run_draft_model", swapped)


@mutation("requests swapped: blocks written by later passes")
def _(monkeypatch, drafter):
    original = v1.decode_pass

    def swapped(token_ids, positions, block_table, *rest):
        return original(token_ids, positions, _roll(block_table), *rest)

    monkeypatch.setattr(v1, "decode_pass", swapped)


@mutation("requests swapped: features")
def _(monkeypatch, drafter):
    original = v1.features_from_logits

    def swapped(logits, hidden_states, **kwargs):
        return original(logits, _roll(hidden_states), **kwargs)

    monkeypatch.setattr(v1, "features_from_logits", swapped)


@mutation("head reads another step's hidden state")
def _(monkeypatch, drafter):
    original = v1.features_from_logits
    kept: dict[int, torch.Tensor] = {}

    def stale(logits, hidden_states, **kwargs):
        last = kept.get(len(hidden_states), hidden_states)
        kept[len(hidden_states)] = hidden_states
        return original(logits, last, **kwargs)

    monkeypatch.setattr(v1, "features_from_logits", stale)


@pytest.fixture(scope="module")
def llm(tiny):
    config = {
        "method": "specdecpp", "model": tiny.draft_good, "head": tiny.head, "threshold": THRESHOLD,
        "num_speculative_tokens": MAX_LENGTH, "trace_rounds": 100_000,
    }  # fmt: skip
    with harness.engine(tiny.target, config) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(tiny, reference):
    rule = Rule("threshold", THRESHOLD, load_head(tiny.head), max_length=MAX_LENGTH, eos_ids=STOP_IDS)
    return [
        generate(
            reference("target"), reference("draft_good"), prompt, rule,
            max_tokens=MAX_TOKENS, max_model_len=harness.MAX_MODEL_LEN, stop_ids=STOP_IDS,
        )
        for prompt in PROMPTS
    ]  # fmt: skip


def _run(llm: Any) -> tuple[list[list[int]], list[Any]]:
    """Output tokens, and the rounds as the scheduler saw them: a bug in the proposer may be in its log as well."""
    with harness.verified_rounds(llm) as rounds:
        outputs = harness.generate(llm, PROMPTS, max_tokens=MAX_TOKENS)
    return harness.token_ids(outputs), harness.rounds_of(outputs, rounds)


def test_unchanged_proposer_passes(llm, expected):
    tokens, rounds = _run(llm)
    assert tokens == [t for _, t in expected]
    assert rounds == [[(r.candidates, r.accepted, r.next_token) for r in rs] for rs, _ in expected]


@pytest.mark.parametrize("name", list(MUTATIONS))
def test_rounds_catch_it_and_output_does_not(llm, expected, monkeypatch, name):
    MUTATIONS[name](monkeypatch, harness.proposer(llm))
    tokens, rounds = _run(llm)
    assert rounds != [[(r.candidates, r.accepted, r.next_token) for r in rs] for rs, _ in expected]
    assert tokens == [t for _, t in expected]


def test_the_engine_is_whole_again(llm, expected):
    """The patches are undone: what was caught was the mutation."""
    test_unchanged_proposer_passes(llm, expected)
