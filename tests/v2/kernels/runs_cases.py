# SPDX-License-Identifier: Apache-2.0
"""Tokens of all kinds against ``longest_match``, and draft logits of runs; for the kernels and their twins."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_specdecpp.decision.sources.suffix import LATEST, NARROW, PLACES, longest_match


def _rows(rng: Any) -> list[np.ndarray]:
    """Texts whose last tokens stand before often, seldom, never; longer than a block, than what is compared."""
    texts = [rng.integers(0, rng.integers(1, 6), rng.integers(1, 90)) for _ in range(10)]
    part = rng.integers(0, 40, 70)
    texts += [np.concatenate([part, rng.integers(0, 40, gap), part]) for gap in (0, 1, 954, 955, 2100)]
    texts += [np.zeros(1025, dtype=np.int64), np.arange(1030), rng.integers(0, 2, 1500)]
    # The longest match is about as many places back as are compared: of the last token, and of eight tokens.
    for count in (LATEST - 1, LATEST):
        texts.append(np.concatenate([[1, 2, 3, 0], np.resize([5, 0], 2 * count), [1, 2, 3, 0]]))
    part = np.arange(NARROW + 1, 0, -1)
    for count in (PLACES - 1, PLACES):
        others = np.tile([*[30] * 80, *part[1:]], count)
        texts.append(np.concatenate([part, others, part]))
    # Another order each time: some are not asked for.
    return [texts[i] for i in rng.permutation(len(texts))]


def check_matches(launch: Any, seeds: int = 3) -> None:
    """Equal to the function that Model Runner V1 calls, whatever stands behind the last token."""
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        texts = _rows(rng)
        width = max(map(len, texts)) + 3
        tokens = torch.full((len(texts) + 2, width), 1, dtype=torch.int32)
        states = torch.from_numpy(rng.permutation(len(tokens))[: len(texts)].astype(rng.choice(["int32", "int64"])))
        for state, text in zip(states.tolist(), texts, strict=True):
            tokens[state, : len(text)] = torch.from_numpy(text)
            tokens[state, len(text) :] = int(text[-1])  # a draft that was rejected, or another request's tokens
        last = torch.tensor([len(text) - 1 for text in texts])
        limits = torch.arange(len(texts), dtype=torch.int32).fmod(7)
        starts, matches = torch.full_like(last, -7), torch.full_like(limits, -7)
        launch(tokens, states, last, limits, starts=starts, matches=matches)
        for row, text in enumerate(texts):
            wanted = longest_match(text) if limits[row] else (0, 0)
            assert (int(starts[row]), int(matches[row])) == wanted, f"seed {seed}, row {row}"


def check_rows(launch: Any, seeds: int = 3) -> None:
    """Where there is a candidate the row is certain of it; all else stays."""
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        vocab_size = (5, 4096, 9001)[seed % 3]
        dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
        logits = torch.randn(5, 4, vocab_size, generator=generator).to(dtype)
        states = torch.tensor([3, 0, 4], dtype=torch.int32)
        buffer = torch.randint(0, vocab_size, (3, 6), generator=generator)
        candidates = buffer[:, 1:5]
        candidates[0, 2:] = candidates[1] = -1
        wanted: Tensor = logits.clone()
        for row, state in enumerate(states.tolist()):
            for step, token in enumerate(candidates[row].tolist()):
                if token >= 0:
                    wanted[state, step] = -torch.inf
                    wanted[state, step, token] = 0.0
        launch(logits, states, candidates)
        assert torch.equal(logits, wanted), f"seed {seed}"
