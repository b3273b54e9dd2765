# SPDX-License-Identifier: Apache-2.0
"""What vLLM can do besides plain decoding goes on working: outputs equal those without speculation, in float32.

Where the draft's own state is at stake (chunks, preemption, cached prefixes, the length limit), the rounds are compared
with the reference loop as well: a stale draft KV cache changes candidates, never outputs.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests import engine_harness as harness
from tests.reference_loop import GreedyModel, Rule, draft_round, generate, load_head, verify

THRESHOLD = 0.8
MAX_LENGTH = 8
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "count": {"type": "integer", "maximum": 9999}},
    "required": ["name", "count"],
    "additionalProperties": False,
}


CACHING: dict[str, Any] = {"enable_prefix_caching": True, "block_size": 32, "disable_log_stats": False}
"""Of the engine that most tests share."""


def _config(tiny, **options: Any) -> dict[str, Any]:
    return {
        "method": "specdecpp", "model": tiny.draft_good, "head": tiny.head, "threshold": THRESHOLD,
        "num_speculative_tokens": MAX_LENGTH, "trace_rounds": 100_000, **options,
    }  # fmt: skip


def _caching(tiny) -> Any:
    """The engine that most tests share; what is cached, logged and counted begins anew."""
    return harness.kept(tiny.target, _config(tiny), skip_tokenizer_init=False, **CACHING)


def _counters(llm) -> list[int]:
    """vLLM's own: candidates, and those accepted."""
    metrics: dict[str, Any] = {m.name: getattr(m, "value", None) for m in llm.get_metrics()}
    return [metrics[f"vllm:spec_decode_num_{what}_tokens"] for what in ("draft", "accepted")]


def _sampling() -> dict[str, dict[str, Any]]:
    from vllm.sampling_params import StructuredOutputsParams

    return {
        "plain": {"ignore_eos": True},
        "stops at EOS": {},
        "repetition penalty": {"repetition_penalty": 1.3, "ignore_eos": True},
        "presence and frequency penalty": {"presence_penalty": 0.8, "frequency_penalty": 0.5, "ignore_eos": True},
        "allowed tokens": {"allowed_token_ids": list(range(3, 200)), "ignore_eos": True},
        "minimum length": {"min_tokens": 20},
        "stop tokens": {"stop_token_ids": list(range(40, 80))},
        "stop strings": {"stop": ["e", "\n"], "detokenize": True, "ignore_eos": True},
        "bad words": {"bad_words": ["e", "s", " the", "in"], "ignore_eos": True},
        "log-probabilities": {"logprobs": 3, "ignore_eos": True},
        "choice": {"structured_outputs": StructuredOutputsParams(choice=["accepted", "rejected", "recovered"])},
        "regex": {"structured_outputs": StructuredOutputsParams(regex=r"[0-9]{3}-[a-f]{4,9}\.")},
        "JSON schema": {"structured_outputs": StructuredOutputsParams(json=json.dumps(SCHEMA))},
        "one token": {"max_tokens": 1, "ignore_eos": True},
        "two tokens": {"max_tokens": 2, "ignore_eos": True},
    }


PROMPTS = harness.prompts(6, seed=8)


def _run_all(llm: Any) -> dict[str, list[Any]]:
    return {name: harness.generate(llm, PROMPTS, **sampling) for name, sampling in _sampling().items()}


@pytest.fixture(scope="module")
def baseline(tiny):
    with harness.engine(tiny.target, skip_tokenizer_init=False) as llm:
        return _run_all(llm)


@pytest.fixture(scope="module")
def speculative(tiny):
    """The same requests with our method, and the counters of each kind."""
    outputs, stats = {}, {}
    for name, sampling in _sampling().items():
        llm = _caching(tiny)
        outputs[name] = harness.generate(llm, PROMPTS, **sampling)
        stats[name] = llm.collective_rpc("specdecpp_stats")[0]
    return outputs, stats


@pytest.mark.parametrize("name", list(_sampling()))
def test_sampling_features(baseline, speculative, name):
    outputs, stats = speculative
    assert harness.token_ids(outputs[name]) == harness.token_ids(baseline[name])
    assert [o.outputs[0].text for o in outputs[name]] == [o.outputs[0].text for o in baseline[name]]
    reasons = [(o.outputs[0].finish_reason, o.outputs[0].stop_reason) for o in baseline[name]]
    assert [(o.outputs[0].finish_reason, o.outputs[0].stop_reason) for o in outputs[name]] == reasons
    if name not in ("one token", "two tokens"):
        assert stats[name]["accepted"] > 0, "nothing was accepted, so nothing was tried"


@pytest.mark.asks(6)
def test_logprobs_are_the_targets(baseline, speculative):
    for mine, theirs in zip(speculative[0]["log-probabilities"], baseline["log-probabilities"], strict=True):
        for a, b in zip(mine.outputs[0].logprobs, theirs.outputs[0].logprobs, strict=True):
            assert list(a) == list(b)
            assert [x.logprob for x in a.values()] == pytest.approx([x.logprob for x in b.values()], abs=1e-4)


def test_structured_outputs_are_valid(speculative):
    """The constraint holds with speculation (not only: equals a run in which it might fail too)."""
    for output in speculative[0]["choice"]:
        assert output.outputs[0].token_ids and output.outputs[0].finish_reason == "stop"


def _expected(reference, tiny, prompts, *, max_tokens: int, max_model_len: int = harness.MAX_MODEL_LEN):
    rule = Rule("threshold", THRESHOLD, load_head(tiny.head), max_length=MAX_LENGTH)
    return [
        generate(
            reference("target"), reference("draft_good"), p, rule, max_tokens=max_tokens, max_model_len=max_model_len
        )
        for p in prompts
    ]


def _assert_equal(llm, outputs, expected) -> None:
    rounds = harness.rounds_of(outputs, harness.take_rounds(llm))
    assert harness.token_ids(outputs) == [tokens for _, tokens in expected]
    for request, (mine, (theirs, _)) in enumerate(zip(rounds, expected, strict=True)):
        assert mine == [(r.candidates, r.accepted, r.next_token) for r in theirs], f"request {request}"


def test_prefix_caching(tiny, reference):
    """Prompts that are cached but for one token, among them; the second run reads draft KV that the first one wrote."""
    (shared,) = harness.prompts(1, seed=6, shortest=128, longest=128)
    tails = harness.prompts(10, seed=7, shortest=1, longest=9)
    prompts = [shared + tail for tail in tails] + [shared + [5], shared + [6]]
    expected = _expected(reference, tiny, prompts, max_tokens=24)
    llm = _caching(tiny)
    for _ in range(2):
        outputs = harness.generate(llm, prompts, ignore_eos=True, max_tokens=24)
        _assert_equal(llm, outputs, expected)
    assert min(o.num_cached_tokens for o in outputs) >= 128


def test_vllms_own_counters_agree(tiny):
    """vLLM's Prometheus counters of drafted and accepted tokens equal ours, so nothing unsubmitted is verified."""
    llm = _caching(tiny)
    before = _counters(llm)
    harness.generate(llm, harness.prompts(8, seed=2), ignore_eos=True)
    counted, stats = _counters(llm), llm.collective_rpc("specdecpp_stats")[0]
    assert [b - a for a, b in zip(before, counted, strict=True)] == [stats["candidates"], stats["accepted"]]


@pytest.mark.parametrize("off", [False, True], ids=["drafting", "off"])
def test_a_prompt_that_is_cached_but_for_one_token_costs_one_row(tiny, monkeypatch, off):
    """vLLM pads such a prompt to the length of a round, with drafts that its counters book."""
    (prompt,) = harness.prompts(1, seed=6, shortest=65, longest=65)  # two blocks and a token
    sampling = {"max_tokens": 12, "extra_args": {"specdecpp": {"enabled": False}} if off else None}
    rows: list[int] = []
    llm = _caching(tiny)
    before = _counters(llm)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    schedule = scheduler.schedule

    def scheduled(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        rows.extend(output.num_scheduled_tokens.values())
        return output

    first = harness.generate(llm, [prompt], ignore_eos=True, **sampling)
    monkeypatch.setattr(scheduler, "schedule", scheduled)
    again = harness.generate(llm, [prompt], ignore_eos=True, **sampling)
    assert again[0].num_cached_tokens == 64 and harness.token_ids(again) == harness.token_ids(first)
    assert rows[0] == 1 and (max(rows) == 1) is off
    assert _counters(llm)[0] - before[0] == llm.collective_rpc("specdecpp_stats")[0]["candidates"]


def test_chunked_prefill(tiny, reference):
    """Prompts of up to five chunks, so that prefill chunks, first rounds and later rounds share batches."""
    prompts = harness.prompts(12, seed=4, shortest=20, longest=140)
    expected = _expected(reference, tiny, prompts, max_tokens=24)
    llm = harness.kept(tiny.target, _config(tiny), max_num_batched_tokens=48)
    _assert_equal(llm, harness.generate(llm, prompts, ignore_eos=True, max_tokens=24), expected)


def test_rounds_that_wait_for_room_are_counted(tiny, monkeypatch):
    """A step has room for two requests' rounds: those of others are verified later, or cut."""
    waited = 0
    llm = harness.kept(tiny.target, _config(tiny), max_num_batched_tokens=48)
    harness.configure(llm, rule="fixed", threshold=None)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    schedule = scheduler.schedule

    def scheduled(*args: Any, **kwargs: Any) -> Any:
        nonlocal waited
        output = schedule(*args, **kwargs)
        left_out = [r for r in scheduler.running if r.request_id not in output.num_scheduled_tokens]
        waited += sum(bool(request.spec_token_ids) for request in left_out)
        return output

    monkeypatch.setattr(scheduler, "schedule", scheduled)
    monkeypatch.setattr(scheduler, "max_num_scheduled_tokens", 20)
    with harness.verified_rounds(llm) as rounds:
        outputs = harness.generate(llm, harness.prompts(6, seed=3, longest=5), ignore_eos=True, max_tokens=40)
    assert waited > 5
    assert harness.rounds_of(outputs, harness.take_rounds(llm)) == harness.rounds_of(outputs, rounds)
    harness.configure(llm, rule="threshold", threshold=THRESHOLD)


def test_near_max_model_len(tiny, reference):
    """Requests that reach the limit at different times; one that is close to it must not stop the others' drafts."""
    limit = 64
    prompts = harness.prompts(12, seed=5, shortest=5, longest=62)
    prompts[0] = prompts[0][:4] * 16
    prompts[0] = prompts[0][: limit - 1]  # room for one token
    expected = _expected(reference, tiny, prompts, max_tokens=200, max_model_len=limit)
    with harness.engine(tiny.target, _config(tiny), max_model_len=limit) as llm:
        _assert_equal(llm, harness.generate(llm, prompts, ignore_eos=True, max_tokens=200), expected)


def _check_rounds_from_their_prefixes(
    rounds: list[tuple[list[int], int, int]], prompt: list[int], output: list[int],
    target: GreedyModel, draft: GreedyModel, rule: Rule, max_tokens: int,
) -> int:  # fmt: skip
    """Each round equals the oracle's from the same prefix; returns how many tokens were emitted outside rounds.

    A preempted request is read anew, which emits one token without drafting.
    """
    emitted, skipped = 1, 0
    for candidates, accepted, next_token in rounds:
        while True:
            assert emitted < len(output), f"no prefix of the output gives the round {candidates}"
            prefix = [*prompt, *output[:emitted]]
            want = verify(target, prefix, draft_round(draft, prefix, rule, max_tokens - emitted - 1))
            if (want.candidates, want.accepted, want.next_token) == (candidates, accepted, next_token):
                break
            emitted, skipped = emitted + 1, skipped + 1
        emitted += accepted + 1
    return skipped + len(output) - emitted


def test_preemption(tiny, reference):
    """Too few KV blocks for four requests: some are thrown out and read again."""
    max_tokens = 50
    prompts = harness.prompts(8, seed=9, shortest=40, longest=60)
    rule = Rule("threshold", THRESHOLD, load_head(tiny.head), max_length=MAX_LENGTH)
    expected = _expected(reference, tiny, prompts, max_tokens=max_tokens)
    with harness.engine(
        tiny.target, _config(tiny), num_gpu_blocks_override=10, block_size=32, disable_log_stats=False
    ) as llm:
        outputs = harness.generate(llm, prompts, ignore_eos=True, max_tokens=max_tokens)
        rounds = harness.rounds_of(outputs, harness.take_rounds(llm))
        (preemptions,) = [m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"]
    assert preemptions > 0
    assert harness.token_ids(outputs) == [tokens for _, tokens in expected]
    skipped = sum(
        _check_rounds_from_their_prefixes(
            mine, prompt, tokens, reference("target"), reference("draft_good"), rule, max_tokens
        )
        for mine, prompt, (_, tokens) in zip(rounds, prompts, expected, strict=True)
    )
    assert skipped <= preemptions


def test_dynamic_speculation(tiny, reference):
    """vLLM's schedule by batch size, down to no candidates: the draft's KV stays in step for the rounds after."""
    max_tokens = 24
    prompts = harness.prompts(7, seed=10)
    rule = Rule("threshold", THRESHOLD, load_head(tiny.head), max_length=MAX_LENGTH)
    expected = _expected(reference, tiny, prompts, max_tokens=max_tokens)
    schedule = [[1, 1, MAX_LENGTH], [2, 3, 3], [4, 4, 0]]
    bounds = set()
    with harness.engine(tiny.target, _config(tiny, num_speculative_tokens_per_batch_size=schedule)) as llm:
        outputs = harness.generate(llm, prompts, ignore_eos=True, max_tokens=max_tokens)
        rounds = harness.rounds_of(outputs, harness.take_rounds(llm))
    assert harness.token_ids(outputs) == [tokens for _, tokens in expected]
    for mine, prompt, (_, tokens) in zip(rounds, prompts, expected, strict=True):
        emitted = 1
        for candidates, accepted, _ in mine:
            room = max_tokens - emitted - 1
            allowed = {
                bound: draft_round(
                    reference("draft_good"), [*prompt, *tokens[:emitted]], rule, min(bound, room)
                )
                for *_, bound in schedule
            }  # fmt: skip
            assert candidates in allowed.values()
            bounds |= {bound for bound, drafted in allowed.items() if drafted == candidates and room >= MAX_LENGTH}
            emitted += accepted + 1
        assert emitted == len(tokens)
    assert bounds == {0, 3, MAX_LENGTH}
