# SPDX-License-Identifier: Apache-2.0
"""With asynchronous scheduling every round is verified at its full booked width, and ends where its draft ended."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests import engine_harness as harness
from tests.engine.test_parity import make_rule
from tests.reference_loop import generate
from tests.v2 import async_on_cpu
from tests.v2 import harness as v2_harness
from tests.v2.cost_rounds import late_copies
from vllm_specdecpp.costs import timing

MAX_LENGTH, MAX_TOKENS = 5, 16
PROMPTS = harness.prompts(4, seed=12)
CURVES = {"first": {1: 1e-3}, "step": {1: 1e-3}, "verify": {1: 10e-3, 24: 13e-3}}
CASE: dict[str, Any] = {"rule": "confidence", "threshold": 0.6, "num_speculative_tokens": MAX_LENGTH}


@pytest.fixture(scope="module")
def structured(tiny):
    """The grammar's answers without speculation."""
    with harness.engine(tiny.target, skip_tokenizer_init=False) as llm:
        return _structured(llm)


@pytest.fixture
def llm(tiny, structured, monkeypatch):
    """One engine for all tests; only one can live at a time."""
    async_on_cpu.allow(monkeypatch)
    config = {"method": "specdecpp", "model": tiny.draft_good, "trace_rounds": 100_000, **CASE}
    llm = harness.kept(tiny.target, config, async_scheduling=True, skip_tokenizer_init=False)
    harness.configure(llm, **CASE)
    return llm


def _structured(llm: Any) -> list[list[int]]:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    params = SamplingParams(
        temperature=0.0, max_tokens=24, structured_outputs=StructuredOutputsParams(regex=r"[0-9]{3}-[a-f]{4,9}\.")
    )
    return harness.token_ids(llm.generate([{"prompt_token_ids": p} for p in PROMPTS[:3]], params, use_tqdm=False))


def _expected(tiny: Any, reference: Any) -> list[Any]:
    return [
        generate(
            reference("target"), reference("draft_good"), prompt, make_rule(CASE, None),
            max_tokens=MAX_TOKENS, max_model_len=harness.MAX_MODEL_LEN,
        )
        for prompt in PROMPTS
    ]  # fmt: skip


def test_rounds_equal_the_reference(llm, monkeypatch, tiny, reference):
    expected = _expected(tiny, reference)
    booked: list[int] = []
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    assert type(scheduler).__name__ == "AsyncScheduler"
    original = scheduler.schedule

    def schedule(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        booked.extend(map(len, output.scheduled_spec_decode_tokens.values()))
        return output

    monkeypatch.setattr(scheduler, "schedule", schedule)
    outputs = harness.generate(llm, PROMPTS, max_tokens=MAX_TOKENS, ignore_eos=True)
    rounds = harness.rounds_of(outputs, harness.take_rounds(llm))
    assert harness.token_ids(outputs) == [tokens for _, tokens in expected]
    lengths = set()
    for mine, (theirs, _) in zip(rounds, expected, strict=True):
        # The scheduler runs ahead: a request may be in one more step after its last token.
        assert mine[: len(theirs)] == [(r.candidates, r.accepted, r.next_token) for r in theirs]
        assert len(mine) <= len(theirs) + 1
        lengths |= {len(r.candidates) for r in theirs}
    assert len(lengths) >= 4
    assert set(booked) == {MAX_LENGTH}  # nothing was trimmed on the host


@pytest.mark.parametrize("masked", [True, False])
def test_what_was_booked_beyond_a_draft_is_never_accepted(llm, monkeypatch, tiny, reference, masked):
    """The room is filled with what the draft would have gone on with; without the mask that is accepted, and shows."""
    from vllm_specdecpp.decision.rules import FixedRule
    from vllm_specdecpp.engine.v2 import sampler as v2_sampler
    from vllm_specdecpp.engine.v2 import speculator as v2

    expected = _expected(tiny, reference)
    original = v2.SpecDecPPSpeculator.propose

    def propose(self: Any, *args: Any, **kwargs: Any) -> Any:
        rule, note = self.round.rule, self._note
        self.round.set_rule(FixedRule(), 1)
        self._note = lambda *_: None
        longest = original(self, *args, **kwargs)
        self.round.set_rule(rule, 1)
        self._note = note
        handed = original(self, *args, **kwargs)
        return handed.where(self.draft_tokens[: len(handed)] >= 0, longest)

    monkeypatch.setattr(v2.SpecDecPPSpeculator, "propose", propose)
    if not masked:
        plain = v2_sampler.RejectionSampler.__call__
        monkeypatch.setattr(v2_sampler.EndOfDraftSampler, "__call__", plain)
    outputs = harness.generate(llm, PROMPTS, max_tokens=MAX_TOKENS, ignore_eos=True)
    rounds = harness.rounds_of(outputs, harness.take_rounds(llm))
    assert harness.token_ids(outputs) == [tokens for _, tokens in expected]
    same = [
        mine[: len(theirs)] == [(r.candidates, r.accepted, r.next_token) for r in theirs]
        for mine, (theirs, _) in zip(rounds, expected, strict=True)
    ]
    assert all(same) == masked


def test_structured_output(llm, structured):
    """The grammar checks the drafts before they are verified; what it gets must be the drafts."""
    assert _structured(llm) == structured


def test_the_cost_aware_rule_learns_of_rounds_late(llm, monkeypatch, tiny, reference):
    """Each outcome comes when the next round has begun; every one reaches its own round, none twice, none never."""
    monkeypatch.setattr(timing, "measure", lambda *args: CURVES)
    late_copies(monkeypatch, by=1)
    draft = reference("draft_good")
    harness.configure(llm, rule="cost_aware", threshold=None)
    cost_aware = v2_harness.fix_costs(llm, CURVES)
    rule, told, in_flight = cost_aware.rule, [], []
    finish = rule.finish

    def spy(round_: Any, verified: Any, accepted: Any, *times: Any) -> None:
        in_flight.append(cost_aware.in_flight.num(cost_aware._learn_from))
        told.append((round_.lengths.tolist(), list(verified), list(accepted)))
        finish(round_, verified, accepted, *times)

    rule.finish = spy
    outputs = harness.generate(llm, PROMPTS, max_tokens=MAX_TOKENS, ignore_eos=True)
    rounds = harness.rounds_of(outputs, harness.take_rounds(llm))
    stats = llm.collective_rpc("specdecpp_stats")[0]
    assert harness.token_ids(outputs) == [tokens for _, tokens in _expected(tiny, reference)]
    assert max(in_flight) == 1  # of the round that is verified in this step nothing is known yet
    for mine, prompt, tokens in zip(rounds, PROMPTS, harness.token_ids(outputs), strict=True):
        context = [*prompt, tokens[0]]
        for candidates, accepted, next_token in mine:
            assert candidates == [draft.steps([*context, *candidates[:k]])[0].token for k in range(len(candidates))]
            context += [*candidates[:accepted], next_token]
    known = [(v, a) for _, verified, wins in told for v, a in zip(verified, wins, strict=True) if v is not None]
    logged = [(len(candidates), accepted) for mine in rounds for candidates, accepted, _ in mine]
    # The last step's outcome is still on its way.
    assert len(logged) - len(PROMPTS) <= len(known) <= len(logged)
    assert not Counter(known) - Counter(logged)
    assert len({n for n, _ in logged}) >= 4 and stats["cost_aware"]["admission"]["rho"] > 0
    harness.end_kept()  # its last rounds' copies never arrive
