# SPDX-License-Identifier: Apache-2.0
"""A draft cut to some token ids: its rounds are the reference loop's, and sampled output keeps the target's law.

The law alone would not notice a draft that proposes the wrong ids: verification repairs them. So planted bugs of the
map are caught by the rounds, and those of the probabilities by the law.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import pytest
import torch

from tests import engine_harness as harness
from tests import trimmed
from tests.engine.test_parity import assert_parity, configure, make_rule
from tests.exact_law import joint_law, p_value
from tests.planted_bugs import Bugs, after, change_result
from tests.reference_loop import generate
from tests.tiny_models import EOS
from tests.trimmed import SMALL_TOKEN_IDS, TOKEN_IDS

MAX_TOKENS = 20
PROMPTS = harness.prompts(6, seed=2)
STOP_IDS = frozenset({EOS})
CASES: list[dict[str, Any]] = [
    {"rule": "confidence", "threshold": 0.6, "num_speculative_tokens": 6},
    {"rule": "entropy", "threshold": 0.9, "num_speculative_tokens": 6},
    {"rule": "fixed", "num_speculative_tokens": 4},
]
PROMPT, LAW_LENGTH = [3, 5, 4, 7, 6], 3
FAILS_BELOW = 1e-4
"""p-value. Seeds are fixed, so a passing case goes on passing."""

MAP_BUGS, LAW_BUGS = Bugs(), Bugs()
"""Each is given pytest's monkeypatch, the drafter and its draft model."""


@MAP_BUGS.named("wrong map")
def _(monkeypatch, drafter, model):
    _map_to(monkeypatch, model, lambda columns: columns.flip(0))


@MAP_BUGS.named("off by one")
def _(monkeypatch, drafter, model):
    _map_to(monkeypatch, model, lambda columns: columns + 1)


@MAP_BUGS.named("the next id's row")
def _(monkeypatch, drafter, model):
    change_result(monkeypatch, model.lm_head.quant_method, "apply", lambda logits, *_: logits.roll(1, dims=1))


@MAP_BUGS.named("missing stop token")
def _(monkeypatch, drafter, model):
    missing = TOKEN_IDS.index(EOS)
    change_result(
        monkeypatch, model.lm_head.quant_method, "apply",
        lambda logits, *_: logits.index_fill(1, torch.tensor(missing), -torch.inf),
    )  # fmt: skip


def _map_to(monkeypatch: Any, model: Any, change: Any) -> None:
    token_ids = model.logits_processor.specdecpp_token_ids
    monkeypatch.setattr(token_ids, "data", change(token_ids) % 512)


def _unmapped(probs: torch.Tensor, nothing: float) -> torch.Tensor:
    """As if columns were ids."""
    wrong = torch.full_like(probs, nothing)
    wrong[..., : len(SMALL_TOKEN_IDS)] = probs[..., SMALL_TOKEN_IDS]
    return wrong


@LAW_BUGS.named("unmapped probability")
def _(monkeypatch, drafter, model):
    if hasattr(drafter, "draft_logits"):  # Model Runner V2 keeps q as logits
        after(monkeypatch, drafter, "_draft", lambda *_: _unmap(drafter.draft_logits))
    else:
        change_result(monkeypatch, drafter.columns, "spread", lambda probs, *_: _unmapped(probs, 0.0))


def _unmap(logits: torch.Tensor) -> None:
    logits.copy_(_unmapped(logits, -torch.inf))


def drafter_and_model(llm: Any) -> tuple[Any, Any]:
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    model = runner.get_draft_model()
    return next(d for d in (getattr(runner, "speculator", None), getattr(runner, "drafter", None)) if d), model


@pytest.fixture(scope="module")
def llm(tiny, tmp_path_factory):
    draft = trimmed.save(tiny.draft_good, tmp_path_factory.mktemp("trimmed") / "draft")
    config = {
        "method": "specdecpp", "model": draft, "rule": "fixed", "num_speculative_tokens": 6, "trace_rounds": 100_000
    }  # fmt: skip
    with harness.engine(tiny.target, config, block_size=32) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(tiny, reference):
    draft = trimmed.oracle(tiny.draft_good)

    @functools.cache
    def run(case: int) -> list[Any]:
        rule = make_rule(CASES[case], None, STOP_IDS)
        sizes: dict[str, Any] = {"max_tokens": MAX_TOKENS, "max_model_len": harness.MAX_MODEL_LEN, "stop_ids": STOP_IDS}
        return [generate(reference("target"), draft, prompt, rule, **sizes) for prompt in PROMPTS]

    return run


def _run(llm: Any, case: int) -> tuple[list[Any], list[list[int]]]:
    """Rounds and output tokens."""
    configure(llm, CASES[case])
    with harness.verified_rounds(llm) as rounds:
        outputs = harness.generate(llm, PROMPTS, max_tokens=MAX_TOKENS)
    return harness.rounds_of(outputs, rounds), harness.token_ids(outputs)


@pytest.mark.parametrize("case", range(len(CASES)), ids=[c["rule"] for c in CASES])
def test_rounds_equal_the_reference(llm, expected, case):
    rounds, tokens = _run(llm, case)
    want = expected(case)
    assert_parity(rounds, want)
    assert tokens == [t for _, t in want]
    candidates = [t for request in rounds for drafted, *_ in request for t in drafted]
    assert set(candidates) <= set(TOKEN_IDS) and EOS in candidates
    assert sum(accepted for request in rounds for _, accepted, _ in request) > 0.1 * len(candidates)
    assert not {t for request in tokens for t in request} <= set(TOKEN_IDS)  # the target goes on emitting all


@pytest.mark.parametrize("name", MAP_BUGS)
def test_rounds_catch_a_wrong_map_and_output_does_not(llm, expected, monkeypatch, name):
    MAP_BUGS[name](monkeypatch, *drafter_and_model(llm))
    rounds, tokens = _run(llm, 2)
    want = expected(2)
    assert rounds != [[(r.candidates, r.accepted, r.next_token) for r in rs] for rs, _ in want]
    assert tokens == [t for _, t in want]


def test_the_engine_is_whole_again(llm, expected):
    """The bugs are taken out: what was caught was the bug."""
    assert_parity(_run(llm, 2)[0], expected(2))


@pytest.fixture(scope="module", params=["greedy", "probabilistic"])
def sampling_llm(request, tiny, tmp_path_factory):
    """An engine on the small vocabulary, with one way to draw candidates."""
    draft = trimmed.save(tiny.small_draft, tmp_path_factory.mktemp("trimmed") / "draft", SMALL_TOKEN_IDS)
    config = {
        "method": "specdecpp", "model": draft, "rule": "confidence", "threshold": 0.8, "num_speculative_tokens": 4,
        "draft_sample_method": request.param, "trace_rounds": 100_000,
    }  # fmt: skip
    options = {"max_model_len": 64, "max_num_seqs": 32, "max_num_batched_tokens": 512}
    with harness.engine(tiny.small_target, config, **options) as llm:
        llm.draft_sample_method = request.param
        yield llm


def law_of_samples(llm: Any, tiny: Any, temperature: float, num_samples: int, of_tokens: slice) -> float:
    """p-value of sampled tokens, counted by those of ``of_tokens``, under the target's own law."""
    from transformers import AutoModelForCausalLM

    law: Counter[tuple[int, ...]] = Counter()
    model = AutoModelForCausalLM.from_pretrained(tiny.small_target, dtype=torch.float32)
    for tokens, probability in joint_law(model, PROMPT, LAW_LENGTH, temperature).items():
        law[tokens[of_tokens]] += probability  # type: ignore[assignment]
    harness.take_rounds(llm)
    torch.manual_seed(4)
    outputs = harness.generate(
        llm, [PROMPT] * (num_samples // 32), n=32, max_tokens=LAW_LENGTH + 1, ignore_eos=True, temperature=temperature
    )
    rounds = harness.take_rounds(llm)
    candidates = [t for r in rounds for t in r["candidates"]]
    assert set(candidates) <= set(SMALL_TOKEN_IDS)
    assert 0.1 < sum(r["accepted"] for r in rounds) / len(candidates) < 0.95  # both branches of the sampler are used
    samples = [tuple(c.token_ids[:LAW_LENGTH])[of_tokens] for o in outputs for c in o.outputs]
    return p_value(samples, dict(law))


NUM_SAMPLES, OF_TOKENS = 2048, slice(LAW_LENGTH)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_sampled_output_keeps_its_law(sampling_llm, tiny, temperature):
    assert law_of_samples(sampling_llm, tiny, temperature, NUM_SAMPLES, OF_TOKENS) > FAILS_BELOW


@pytest.mark.parametrize("name", LAW_BUGS)
def test_the_law_catches_wrong_probabilities(sampling_llm, tiny, monkeypatch, name):
    if sampling_llm.draft_sample_method == "greedy":
        pytest.skip("greedy drafts have no probabilities")
    LAW_BUGS[name](monkeypatch, *drafter_and_model(sampling_llm))
    assert law_of_samples(sampling_llm, tiny, 1.0, NUM_SAMPLES, OF_TOKENS) < FAILS_BELOW
