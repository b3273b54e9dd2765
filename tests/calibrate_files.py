# SPDX-License-Identifier: Apache-2.0
"""Datasets with a planted law of acceptance, and heads that know it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.dataset_files import make_manifest
from vllm_specdecpp.data.prompts import Prompt, PromptName, digest
from vllm_specdecpp.data.shard_file import RoundRecord, shard_from_rounds, write_shard
from vllm_specdecpp.data.shards import create_dataset
from vllm_specdecpp.head.model import AcceptanceHead
from vllm_specdecpp.training.fit.held_out import prompt_lists

HIDDEN, K, W_REJ = 8, 3, 6.0


def make_dataset(
    folder: Path,
    ids: Sequence[str],
    *,
    seed: int = 0,
    rounds: int = 40,
    sets: Sequence[str] = ("a", "b"),
    lag: int = 0,
    shift_of: Any = lambda prompt_id: 0.0,
    draft: str = "org/draft",
    target: str = "org/target",
    hidden_size: int = HIDDEN,
) -> Path:
    """Rounds whose candidates are accepted with log-odds 1 + 1.5 h + shift; h is the first number of the state that a
    head of this lag reads. The top-1 probability knows h but for noise."""
    prompts_digest = digest([Prompt(each, "", "") for each in ids])
    prompts = [Prompt(prompt_id, sets[i % len(sets)], "") for i, prompt_id in enumerate(ids)]
    generator = torch.Generator().manual_seed(seed)
    manifest = make_manifest(
        target=target, draft=draft, hidden_size=hidden_size, num_candidates=K, prompts_digest=prompts_digest
    )
    records = []
    for prompt in prompts:
        for _ in range(rounds):
            hidden = torch.randn(K + 1, hidden_size, generator=generator)
            known = hidden[lag : lag + K, 0]  # lag 1 reads the state of the next candidate's pass
            logit = 1 + 1.5 * known + shift_of(prompt.id)
            accepted = torch.bernoulli(logit.sigmoid(), generator=generator).tolist()
            guess = (logit + 1.5 * torch.randn(K, generator=generator)).sigmoid()
            records.append(
                RoundRecord(
                    request_id=prompt.id, hidden_states=hidden[:K], token_ids=[1] * K, top1_prob=guess,
                    entropy=3 * (1 - guess), margin=guess * 4,
                    soft_label=torch.full((K,), math.nan), num_accepted=(accepted + [0.0]).index(0.0), num_verified=K,
                    emitted=0, temperature=0.0,
                )
            )  # fmt: skip
    dataset = create_dataset(folder, manifest, force=False)
    by_request = {prompt.id: {"id": prompt.id, "set": prompt.set} for prompt in prompts}
    write_shard(dataset.shard_path(0), shard_from_rounds(records, by_request), dataset.manifest)
    return folder


def make_head(folder: Path, *, lag: int = 0, **metadata: Any) -> Path:
    """Knows the law of :func:`make_dataset`, at the optimum of a loss with ``w_rej`` 6."""
    head = AcceptanceHead(HIDDEN, num_layers=0, lag=lag)
    with torch.no_grad():
        head.output.weight.zero_()
        head.output.bias.zero_()
        head.output.weight[1, 0] = 1.5
        head.output.bias[1] = 1 - math.log(W_REJ)
    head.metadata = {"draft": "org/draft", "target": "org/target", "w_rej": W_REJ, **metadata}
    head.save_pretrained(folder)
    return folder


def write_provenance(head: Path, prompts: Sequence[PromptName], validation: float = 0.3, seed: int = 5) -> None:
    """As ``train`` writes it, of these prompts."""
    (head / "provenance.json").write_text(json.dumps({"prompts": prompt_lists(prompts, validation, seed)}))


def ids(prefix: str, num: int = 30) -> list[str]:
    return [f"{prefix}-{i}" for i in range(num)]
