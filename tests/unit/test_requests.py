# SPDX-License-Identifier: Apache-2.0
"""How long one request may draft: its limits, its own wishes, and whether it needs the draft model again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from vllm_specdecpp.engine.v1.requests import RunnerRequests


def requests_of(*params: dict[str, Any], prompt: int = 10, prefilling: tuple[int, ...] = ()) -> RunnerRequests:
    """Requests "r0", "r1", ... after their prefill step, in a runner that has what is read of one."""
    names = [f"r{i}" for i in range(len(params))]
    known = {
        name: SimpleNamespace(
            sampling_params=SimpleNamespace(
                **{"max_tokens": 50, "stop_token_ids": [], "eos_token_id": None, "extra_args": None, **given}
            ),
            num_prompt_tokens=prompt,
        )
        for name, given in zip(names, params, strict=True)
    }
    batch = SimpleNamespace(num_computed_tokens_cpu=np.zeros(len(names), dtype=np.int32), req_ids=names)
    mask = np.array([i in prefilling for i in range(len(names))])
    runner = SimpleNamespace(input_batch=batch, requests=known, discard_request_mask=SimpleNamespace(np=mask))
    return RunnerRequests(runner, longest=100)


def lengths(requests: RunnerRequests, num: int, prompt: int = 10) -> list[int]:
    rows = requests.rows([prompt * i for i in range(num + 1)], [0] * num)
    return [requests.max_length(row, index, 20) for index, row in enumerate(rows)]


def test_each_request_has_its_own_bound():
    requests = requests_of(
        {},
        {"extra_args": {"specdecpp": {"enabled": False}}},
        {"extra_args": {"specdecpp": '{"num_speculative_tokens": 3}'}},
        {"extra_args": {"other": 1}},
        {"max_tokens": 4, "extra_args": {"specdecpp": {"num_speculative_tokens": 3}}},
    )
    assert lengths(requests, 5) == [20, 0, 3, 20, 2]  # the last: one emitted, one is the target's, so 2 of 4


def test_a_request_that_is_off_does_not_keep_the_draft_model_busy():
    requests = requests_of({}, {"extra_args": {"specdecpp": 0}}, prefilling=(0, 1))
    rows = requests.rows([0, 10, 20], [0, 0])
    assert [requests.will_go_on(row, index) for index, row in enumerate(rows)] == [True, False]
    assert lengths(requests, 2) == [0, 0]  # an unfinished prefill drafts nothing


def test_a_bad_switch_that_slipped_in_does_not_end_the_engine():
    requests = requests_of({"extra_args": {"specdecpp": "maybe"}})
    assert lengths(requests, 1) == [20]


def test_beyond_the_drafts_positions_nothing_is_drafted_or_read():
    """Sequences are drafted for up to 100 tokens: the last candidate stands at position 98 at most."""
    for prompt, room in ((10, 20), (90, 8), (97, 1), (98, 0), (130, 0)):
        requests = requests_of({}, prompt=prompt)
        assert lengths(requests, 1, prompt) == [room]
        (row,) = requests.rows([0, prompt], [0])
        assert requests.will_go_on(row, 0) is (room > 0)
        reads = requests_of({}, prompt=prompt, prefilling=(0,))
        assert reads.will_go_on(reads.rows([0, 8], [0])[0], 0) is (room > 0), "a chunk of a prompt that is too long"
