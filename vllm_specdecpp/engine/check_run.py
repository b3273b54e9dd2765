# SPDX-License-Identifier: Apache-2.0
"""``vllm-specdecpp check --run``: ten greedy answers without speculation and with it, one engine after the other."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

PROMPTS = (
    "Write a Python function that merges two sorted lists.",
    "Explain in three sentences why the sky is blue.",
    "Translate into French: The train leaves at seven in the morning.",
    "List the planets of the solar system, with one fact each.",
    "def quicksort(values):\n    ",
    "A farmer has 17 sheep; all but 9 run away. How many are left? Explain.",
    "Summarise: The meeting was moved from Monday to Thursday, as two of the speakers were ill.",
    "Write a short letter that declines an invitation politely.",
    "What is the difference between TCP and UDP?",
    "SELECT name, COUNT(*) FROM orders ",
)
NEAR_TIE = 0.1
"""Nats between the target's two likeliest tokens below which a round's further rows may turn the choice."""


def compare(engine_args: Callable[[bool], Any], num_tokens: int) -> dict[str, Any]:
    """Facts about the answers and their speed.

    Args:
        engine_args: gives vLLM's ``EngineArgs`` with speculation, or without.
        num_tokens: of an answer, at most.

    Returns:
        ``other answers`` are those that no near tie explains.
    """
    with _engine(engine_args(True)) as llm:
        mine, seconds = _answers(llm, num_tokens)
    with _engine(engine_args(False)) as llm:
        theirs, seconds_off = _answers(llm, num_tokens)
        places = [_first_difference(*pair) for pair in zip(mine, theirs, strict=True)]
        differ = {index: place for index, place in enumerate(places) if place is not None}
        ties = sum(_gap(llm, PROMPTS[index], place) < NEAR_TIE for index, place in differ.items())
    off, on = sum(map(len, theirs)) / seconds_off, sum(map(len, mine)) / seconds
    return {
        "equal answers": len(PROMPTS) - len(differ), "answers after a near tie": ties,
        "other answers": len(differ) - ties,
        "tokens per second, off": off, "tokens per second, on": on, "on over off": on / off,
    }  # fmt: skip


@contextmanager
def _engine(args: Any) -> Iterator[Any]:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM.from_engine_args(args)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def _answers(llm: Any, num_tokens: int) -> tuple[list[list[int]], float]:
    """Token ids and seconds, one request at a time; the first one is answered twice, to warm up."""
    _answer(llm, PROMPTS[0], num_tokens)
    start = time.perf_counter()
    answers = [list(_answer(llm, prompt, num_tokens).token_ids) for prompt in PROMPTS]
    return answers, time.perf_counter() - start


def _answer(llm: Any, prompt: str, num_tokens: int, logprobs: int | None = None) -> Any:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, logprobs=logprobs)
    return llm.generate(prompt, params, use_tqdm=False)[0].outputs[0]


def _first_difference(mine: list[int], theirs: list[int]) -> int | None:
    """Index of the first token that differs, or that one of them lacks."""
    pairs = enumerate(zip(mine, theirs, strict=False))
    found = next((index for index, (a, b) in pairs if a != b), min(len(mine), len(theirs)))
    return None if mine == theirs else found


def _gap(llm: Any, prompt: str, place: int) -> float:
    """Nats between the two likeliest tokens at ``place`` of the answer without speculation."""
    likely = _answer(llm, prompt, place + 1, logprobs=2).logprobs[-1].values()
    first, second = sorted((entry.logprob for entry in likely), reverse=True)[:2]
    return float(first - second)
