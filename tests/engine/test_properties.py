# SPDX-License-Identifier: Apache-2.0
"""Whatever the mix of requests and the rule: greedy answers are the target's, nothing is lost, and each slot of the
draft's KV cache that is read holds what it should. Model Runner V1; V2's are in ``tests/v2/test_v2_properties.py``."""

from __future__ import annotations

import random
import resource
import time
from typing import Any

import pytest

from tests import engine_harness as harness
from tests.engine.test_free_runs import Mixed
from tests.mixes import ENGINE, PROMPTS, Request, check, play, shadowed
from vllm_specdecpp.engine.v1.inputs import DraftKV

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

RULES: list[dict[str, Any]] = [
    {"rule": "fixed", "threshold": None},
    {"rule": "threshold", "threshold": 0.7},
    {"rule": "confidence", "threshold": 0.5},
    {"rule": "cost_aware", "threshold": None},
]
REQUESTS = st.builds(
    Request,
    prompt=st.integers(0, len(PROMPTS) - 1),
    shared=st.sampled_from([0, 0, 31, 32, 64]),
    max_tokens=st.integers(1, 24),
    joins=st.integers(0, 12),
    aborted=st.none() | st.integers(1, 8),
    cap=st.none() | st.sampled_from([0, 1, 3]),
    temperature=st.sampled_from([0.0, 0.0, 0.8]),
)
CASES: dict[str, Any] = {
    "requests": st.lists(REQUESTS, min_size=1, max_size=8), "rule": st.sampled_from(RULES),
    "length": st.integers(1, 6), "seed": st.integers(0, 99),
}  # fmt: skip
CROWD = [Request(prompt=i, shared=64, max_tokens=24, joins=i // 3) for i in range(8)]
"""More than finds room."""
IN_ONE_STEP = [Request(max_tokens=1), Request(prompt=1, shared=32, max_tokens=1), Request(shared=32, max_tokens=1)]
"""The last one joins in the step in which the one before fills a block that both have."""
SETTINGS = settings(
    deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)  # fmt: skip


@pytest.fixture(scope="module")
def llm(tiny):
    config = {"method": "specdecpp", "model": tiny.draft_good, "head": tiny.head, "num_speculative_tokens": 6}
    with harness.engine(tiny.target, config, **ENGINE) as llm:
        yield llm


def _serve(llm: Any, target: Any, requests: list[Request], rule: dict[str, Any], length: int, seed: int) -> int:
    """One case; returns the draft KV entries that were read."""
    harness.configure(llm, num_speculative_tokens=length, **rule)
    with shadowed(llm) as shadow, pytest.MonkeyPatch.context() as patch:
        if rule["rule"] == "cost_aware":
            Mixed.put(llm, patch, seed)  # who drafts, takes a run, or is left out, by chance
        check(requests, play(llm, requests), target)
    return shadow.num_read


@settings(SETTINGS, max_examples=40)
@example(CROWD, RULES[3], 6, 1)
@example(IN_ONE_STEP, RULES[0], 1, 0)
@given(**CASES)
def test_any_mix_is_served_right(llm, reference, requests, rule, length, seed):
    _serve(llm, reference("target"), requests, rule, length, seed)


@pytest.mark.slow
@settings(SETTINGS, max_examples=3000, derandomize=False)
@given(**CASES)
def test_any_of_thousands_of_mixes_is_served_right(llm, reference, requests, rule, length, seed):
    _serve(llm, reference("target"), requests, rule, length, seed)


def _one_too_many(patch: Any) -> None:
    original = DraftKV.replace
    late = lambda self, rows, fed, blocks: original(self, rows, [n and n + 1 for n in fed], blocks)  # noqa: E731
    patch.setattr(DraftKV, "replace", late)


def _nothing_is_stale(patch: Any) -> None:
    """Rounds without a draft pass are forgotten."""
    patch.setattr(DraftKV, "first_missing", lambda self, row, blocks: row.first_query_position)


@pytest.mark.parametrize("bug", [_one_too_many, _nothing_is_stale])
def test_the_shadow_sees_stale_kv(llm, reference, monkeypatch, bug):
    assert _serve(llm, reference("target"), CROWD, RULES[3], 6, 1) > 1000
    bug(monkeypatch)
    with pytest.raises(AssertionError, match="holds the KV of other tokens"):
        _serve(llm, reference("target"), CROWD, RULES[3], 6, 1)


@pytest.mark.slow
def test_soak(llm, reference):
    """Thousands of short requests, a fifth of them aborted: nothing lost, and memory flat once caches are warm."""
    chance, memory, start, served = random.Random(8), [], time.monotonic(), 0
    for number in range(60):
        requests = [
            Request(
                prompt=chance.randrange(len(PROMPTS)), shared=chance.choice([0, 0, 32, 64]),
                max_tokens=chance.randint(1, 12), joins=chance.randint(0, 40),
                aborted=chance.choice([None, None, None, None, chance.randint(1, 6)]),
                cap=chance.choice([None, None, None, 0, 2]), temperature=chance.choice([0.0, 0.0, 0.9]),
            )
            for _ in range(50)
        ]  # fmt: skip
        _serve(llm, reference("target"), requests, RULES[number % len(RULES)], chance.randint(1, 6), number)
        served += len(requests)
        memory.append(_resident())
    print(f"{served} requests in {time.monotonic() - start:.0f} s, MiB resident: {memory[::10]}")
    assert memory[-1] - memory[len(memory) // 2] < 32


def _resident() -> int:
    """MiB of this process."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize() >> 20
