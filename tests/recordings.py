# SPDX-License-Identifier: Apache-2.0
"""Engines that record, and what their shards must hold."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from tests import engine_harness as harness
from tests.tiny_models import HIDDEN_SIZE
from vllm_specdecpp.data.manifest import Manifest
from vllm_specdecpp.data.shard_file import read_shard
from vllm_specdecpp.data.shards import create_dataset

STATE_TOLERANCE = 2e-4
"""float32, two implementations: hidden states of unit size, logits of size 10."""
LABEL_TOLERANCE = 2e-3
"""A quotient of probabilities, whose logits differ by ``STATE_TOLERANCE``."""


def manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "kind": "rounds", "target": "target", "draft": "draft", "target_revision": None, "draft_revision": None,
        "hidden_size": HIDDEN_SIZE, "source": "on-policy", "sampling": {}, "num_candidates": 6, "prompts_digest": "",
        "num_prompts": 0, "unit_size": 0, "versions": {}, "git": None, "command": "",
        "created": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return Manifest(**{**fields, **changes})


def config(tiny, **options: Any) -> dict[str, Any]:
    return {
        "method": "specdecpp", "model": tiny.draft_good, "rule": "confidence", "threshold": 0.8,
        "num_speculative_tokens": 6, "trace_rounds": 100_000, **options,
    }  # fmt: skip


def flush(llm: Any, path: Any = None, prompts: Any = None) -> dict[str, Any]:
    """Also starts recording."""
    arguments = {"path": None if path is None else str(path), "prompts": prompts or {}}
    return llm.collective_rpc("specdecpp_flush_records", kwargs=arguments)[0]


def record(llm: Any, folder: Any, requests: list[list[int]], **sampling: Any) -> tuple[list[Any], Any]:
    """Generate; the outputs, and the shard with the requests' numbers as prompt ids."""
    flush(llm)
    harness.take_rounds(llm)
    outputs = harness.generate(llm, requests, **{"ignore_eos": True, **sampling})
    create_dataset(folder, manifest(), False)
    path = folder / "shards" / "00000.safetensors"
    prompts = {o.request_id: {"id": str(i), "set": "s"} for i, o in enumerate(outputs)}
    summary = flush(llm, path, prompts)
    shard = read_shard(path, manifest())
    assert summary["steps"] == len(shard.token_ids)
    assert summary["observed"] == int((shard.outcome >= 0).sum())
    assert summary["accepted"] == int((shard.outcome == 1).sum()) == int(shard.num_accepted.sum())
    return outputs, shard


def rounds_by_request(shard: Any) -> dict[int, list[tuple[slice, int]]]:
    """Request → its rounds, in order: their steps, and their index."""
    grouped = defaultdict(list)
    bounds = shard.round_starts.tolist()
    for index, prompt in enumerate(shard.prompt_index.tolist()):
        grouped[int(shard.prompts[prompt]["id"])].append((slice(bounds[index], bounds[index + 1]), index))
    return grouped


def assert_rounds_are_the_logged_ones(llm: Any, outputs: list[Any], shard: Any) -> int:
    """Candidates, accepted counts, outcomes and positions; returns the number of rounds."""
    logged = harness.rounds_of(outputs, harness.take_rounds(llm))
    recorded = rounds_by_request(shard)
    for request, rounds in enumerate(logged):
        emitted, mine = 1, iter(recorded[request])
        for candidates, accepted, _ in rounds:
            if candidates:
                steps, index = next(mine)
                assert shard.token_ids[steps].tolist() == candidates
                assert shard.num_accepted[index] == accepted
                assert shard.emitted[index] == emitted
                rejected = [0] if accepted < len(candidates) else []
                unknown = [-1] * (len(candidates) - accepted - len(rejected))
                assert shard.outcome[steps].tolist() == [1] * accepted + rejected + unknown
            emitted += accepted + 1
        assert next(mine, None) is None
    return len(shard.num_accepted)


def assert_states_are_the_drafts(shard: Any, requests: list[list[int]], outputs: list[Any], draft: Any) -> None:
    """Hidden states and every scalar feature equal those of the Hugging Face draft on the same prefix."""
    for request, rounds in rounds_by_request(shard).items():
        tokens = list(outputs[request].outputs[0].token_ids)
        for steps, index in rounds:
            candidates = shard.token_ids[steps].tolist()
            prefix = [*requests[request], *tokens[: int(shard.emitted[index])]]
            want = draft.steps([*prefix, *candidates[:-1]], len(candidates))
            states = torch.stack([s.hidden for s in want])  # [num_steps, hidden_size]
            torch.testing.assert_close(shard.hidden_states[steps], states, atol=STATE_TOLERANCE, rtol=STATE_TOLERANCE)
            logits = torch.stack([s.logits for s in want])  # [num_steps, vocab_size]
            logprobs = logits.log_softmax(-1)
            largest = logits.topk(2).values
            columns = {
                "top1_prob": logprobs.exp().amax(-1),
                "entropy": -(logprobs.exp() * logprobs).sum(-1),
                "margin": largest[:, 0] - largest[:, 1],
            }
            for name, column in columns.items():
                torch.testing.assert_close(getattr(shard, name)[steps], column, atol=1e-3, rtol=1e-3, msg=name)


REQUESTS = harness.prompts(8, seed=21)
