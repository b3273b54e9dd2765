# SPDX-License-Identifier: Apache-2.0
"""Things that users ask for and that no other file is about: see ``tests/asks.py``."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests import engine_harness as harness

PROMPTS = harness.prompts(4, seed=21, longest=30)
MAX_TOKENS = 24


def _config(tiny: Any) -> dict[str, Any]:
    return {
        "method": "specdecpp", "model": tiny.draft_good, "rule": "fixed",
        "num_speculative_tokens": 5, "trace_rounds": 100_000,
    }  # fmt: skip


@pytest.fixture
def parser() -> Any:
    """A reasoning parser by whose ``end`` a thought ends."""
    from vllm.reasoning import ReasoningParser, ReasoningParserManager

    class EndsAt(ReasoningParser):
        end = -1

        def is_reasoning_end(self, input_ids: Any) -> bool:
            return self.end in input_ids

        def is_reasoning_end_streaming(self, input_ids: Any, delta_ids: Any) -> bool:
            return self.end in list(delta_ids)

        def extract_content_ids(self, input_ids: list[int]) -> list[int]:
            return input_ids[input_ids.index(self.end) + 1 :] if self.end in input_ids else []

        def extract_reasoning(self, model_output: str, request: Any) -> tuple[str | None, str | None]:
            return None, model_output

    ReasoningParserManager.register_module("ends_at", force=True, module=EndsAt)
    return EndsAt


@pytest.mark.asks(7)
def test_a_grammar_begins_where_reasoning_ends_inside_a_draft(tiny, parser):
    from vllm.sampling_params import StructuredOutputsParams

    grammar = {"structured_outputs": StructuredOutputsParams(regex=r"[0-9]{3}-[a-f]{2}")}
    options: dict[str, Any] = {
        "skip_tokenizer_init": False, "structured_outputs_config": {"reasoning_parser": "ends_at"}
    }  # fmt: skip
    with harness.engine(tiny.target, _config(tiny), **options) as llm:
        free = harness.generate(llm, PROMPTS, max_tokens=MAX_TOKENS, ignore_eos=True)
        prompt, parser.end = _inner(free, harness.rounds_of(free, harness.take_rounds(llm)))
        outputs = harness.generate(llm, [prompt], max_tokens=60, **grammar)
        (rounds,) = harness.rounds_of(outputs, harness.take_rounds(llm))
        content = parser.extract_content_ids(parser, harness.token_ids(outputs)[0])
        answer = llm.get_tokenizer().decode(content, skip_special_tokens=True)
    with harness.engine(tiny.target, **options) as llm:
        wanted = harness.token_ids(harness.generate(llm, [prompt], max_tokens=60, **grammar))
    assert harness.token_ids(outputs) == wanted
    assert re.fullmatch(r"[0-9]{3}-[a-f]{2}", answer)
    assert any(parser.end in candidates[:accepted] for candidates, accepted, _ in rounds)


def _inner(outputs: list[Any], rounds: list[Any]) -> tuple[list[int], int]:
    """A prompt, and a token that comes up first as an accepted candidate with others behind it."""
    for output, mine in zip(outputs, rounds, strict=True):
        for candidates, accepted, _ in mine:
            for token in candidates[: accepted - 1]:
                if token not in output.prompt_token_ids and list(output.outputs[0].token_ids).count(token) == 1:
                    return list(output.prompt_token_ids), token
    raise AssertionError("no such token")


@pytest.mark.asks(14)
def test_the_prefix_cache_hits_as_without_speculation(tiny):
    """Prompts again, and prompts that go on from an answer; of that the block is missing that the last round filled, as
    with vLLM's own speculation: it is hashed when the next step is scheduled."""

    def hits(llm: Any) -> list[list[int]]:
        found, prompts = [], harness.prompts(4, seed=22, shortest=40, longest=70)
        for turn in range(4):
            outputs = harness.generate(llm, prompts, max_tokens=MAX_TOKENS, ignore_eos=True)
            found.append([o.num_cached_tokens for o in outputs])
            if turn == 0:
                continue  # the same prompts
            prompts = [p + t + [5] for p, t in zip(prompts, harness.token_ids(outputs), strict=True)]
        return found

    options: dict[str, Any] = {"enable_prefix_caching": True, "block_size": 32}
    with harness.engine(tiny.target, **options) as llm:
        wanted = hits(llm)
    with harness.engine(tiny.target, _config(tiny), **options) as llm:
        found = hits(llm)
    assert found[:2] == wanted[:2] and max(wanted[1]) > 0
    for mine, theirs in zip(sum(found[2:], []), sum(wanted[2:], []), strict=True):
        assert theirs - 32 <= mine <= theirs and theirs >= 64
