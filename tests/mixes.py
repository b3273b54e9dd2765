# SPDX-License-Identifier: Apache-2.0
"""Mixes of requests that join, share prefixes, are read in chunks, preempted, aborted, and speculated for in every way.

With an assertion on each slot of the draft's KV cache that a pass reads: a shadow of it knows what was written there,
after which tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from tests import engine_harness as harness
from tests.reference_loop import answer

ENGINE: dict[str, Any] = {
    "max_num_batched_tokens": 48, "enable_prefix_caching": True, "block_size": 32, "num_gpu_blocks_override": 12,
}  # fmt: skip
"""Prompts are read in chunks, and four requests do not always find room."""
NOTHING = -1, -1
PROMPTS = harness.prompts(12, seed=51, shortest=1, longest=70)
PREFIX = harness.prompts(1, seed=52, shortest=64, longest=64)[0]


@dataclass(frozen=True)
class Request:
    """One request of a mix."""

    prompt: int = 0
    """Which of :data:`PROMPTS`."""
    shared: int = 0
    """Tokens of :data:`PREFIX` before it."""
    max_tokens: int = 12
    joins: int = 0
    """Step of the engine."""
    aborted: int | None = None
    """Steps after it has joined."""
    cap: int | None = None
    """Its own bound on the candidate length; 0: off."""
    temperature: float = 0.0

    @property
    def tokens(self) -> list[int]:
        return PREFIX[: self.shared] + PROMPTS[self.prompt]


class Shadow:
    """What each slot of the draft's KV cache holds, beside a Model Runner V1 proposer."""

    def __init__(self, proposer: Any) -> None:
        self._slots: dict[int, tuple[int, int]] = {}  # slot -> token, hash of it and all tokens before
        self._run, self._block_size = proposer._run_draft_model, proposer.block_size
        self.num_read = 0

    def run(self, inputs: Any, block_table: Any, draft_index: int) -> Any:
        """In place of ``_run_draft_model``.

        Raises:
            AssertionError: a row reads a slot that does not hold what stands there after its own tokens.
        """
        ends = inputs.query_start_loc.tolist()
        tokens, positions, targets = (t.tolist() for t in (inputs.token_ids, inputs.positions, inputs.slot_mapping))
        for row, (blocks, length) in enumerate(zip(block_table.tolist(), inputs.seq_lens.tolist(), strict=True)):
            where = [blocks[p // self._block_size] * self._block_size + p % self._block_size for p in range(length)]
            for index in range(ends[row], ends[row + 1]):
                if targets[index] >= 0:
                    assert targets[index] == where[positions[index]], "written elsewhere than it is read"
                    before = self._slots.get(where[positions[index] - 1], NOTHING)[1] if positions[index] else 0
                    self._slots[targets[index]] = tokens[index], hash((before, tokens[index]))
            chain = 0
            for position, slot in enumerate(where):
                token, held = self._slots.get(slot, NOTHING)
                chain = hash((chain, token))
                assert held == chain, f"position {position} of {length} holds the KV of other tokens"
            self.num_read += length
        return self._run(inputs, block_table, draft_index)


@contextmanager
def shadowed(llm: Any) -> Iterator[Shadow]:
    """Watch the engine's draft KV, from an empty prefix cache on."""
    assert llm.reset_prefix_cache()
    shadow = Shadow(harness.proposer(llm))
    with mock.patch.object(harness.proposer(llm), "_run_draft_model", shadow.run):
        yield shadow


def play(llm: Any, requests: Sequence[Request]) -> list[list[int]]:
    """Serve a mix; what each request was sent.

    Raises:
        AssertionError: a request or a KV block was lost.
    """
    engine, scheduler = llm.llm_engine, llm.llm_engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    free, last = pool.get_num_free_blocks(), max(request.joins for request in requests)
    sent: list[list[int]] = [[] for _ in requests]
    finished: set[int] = set()
    try:
        _steps(engine, requests, last, sent, finished)
    finally:
        engine.abort_request([str(index) for index in range(len(requests))])
    assert not scheduler.requests and pool.get_num_free_blocks() == free
    assert finished >= {index for index, request in enumerate(requests) if request.aborted is None}
    return sent


def _steps(engine: Any, requests: Sequence[Request], last: int, sent: list[list[int]], finished: set[int]) -> None:
    """Until nobody is left; the last one joins in step ``last``."""
    from vllm import SamplingParams

    step = 0
    while step <= last or engine.has_unfinished_requests():
        for index, request in enumerate(requests):
            if request.joins == step:
                extra = None if request.cap is None else {"specdecpp": {"num_speculative_tokens": request.cap}}
                params = SamplingParams(
                    temperature=request.temperature, max_tokens=request.max_tokens, detokenize=False, ignore_eos=True,
                    extra_args=extra,
                )  # fmt: skip
                engine.add_request(str(index), {"prompt_token_ids": request.tokens}, params)
            if request.aborted is not None and request.joins + request.aborted == step:
                engine.abort_request([str(index)])
        for output in engine.step():
            sent[int(output.request_id)] = list(output.outputs[0].token_ids)
            if output.finished:
                finished.add(int(output.request_id))
        step += 1
        assert step < last + 1000, "requests hang"


def check(requests: Sequence[Request], sent: Sequence[Sequence[int]], target: Any) -> None:
    """Greedy answers are those of the target alone; aborted ones begin so."""
    for request, tokens in zip(requests, sent, strict=True):
        assert request.aborted is not None or len(tokens) == request.max_tokens
        if request.temperature == 0:
            assert list(tokens) == answer(target, request.tokens, len(tokens))
