# SPDX-License-Identifier: Apache-2.0
"""The exact joint law of a small-vocabulary model's first tokens, and the χ² test against it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from transformers import PreTrainedModel

MIN_EXPECTED = 5.0
"""Cells with fewer expected samples are merged, as the χ² approximation wants."""


def _filtered(
    logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None, min_p: float = 0.0,
    logit_bias: Mapping[int, float] = MappingProxyType({}),
) -> torch.Tensor:  # fmt: skip
    """Probabilities [num, vocab_size] after bias, temperature, min-p, then top-k, then top-p."""
    logits = logits.double()
    for token, bias in logit_bias.items():
        logits[:, token] += bias
    probs = (logits / temperature).softmax(-1)
    probs[probs < min_p * probs.amax(-1, keepdim=True)] = 0
    probs /= probs.sum(-1, keepdim=True)
    order = probs.sort(-1, descending=True)
    sorted_probs = order.values
    if top_k is not None:
        sorted_probs[:, top_k:] = 0
        sorted_probs /= sorted_probs.sum(-1, keepdim=True)
    if top_p is not None:
        before = sorted_probs.cumsum(-1) - sorted_probs  # the mass of the more probable tokens
        sorted_probs[before >= top_p] = 0
        sorted_probs /= sorted_probs.sum(-1, keepdim=True)
    return torch.zeros_like(probs).scatter(-1, order.indices, sorted_probs)


@torch.inference_mode()
def joint_law(
    model: PreTrainedModel, prompt: Sequence[int], num_tokens: int, temperature: float,
    top_k: int | None = None, top_p: float | None = None, **more: Any,
) -> dict[tuple[int, ...], float]:  # fmt: skip
    """P(first ``num_tokens`` tokens) for every possible sequence of them; ``more``: ``min_p``, ``logit_bias``."""
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(num_tokens):
        prefixes = list(law)
        logits = model(torch.tensor([[*prompt, *p] for p in prefixes])).logits[:, -1]  # [num_prefixes, vocab_size]
        probs = _filtered(logits, temperature, top_k, top_p, **more)
        law = {
            (*prefix, token): law[prefix] * p
            for prefix, row in zip(prefixes, probs.tolist(), strict=True)
            for token, p in enumerate(row)
        }
    return law


def p_value(samples: Iterable[tuple[int, ...]], law: dict[tuple[int, ...], float]) -> float:
    """P(a χ² statistic at least this large | the samples follow ``law``); 0 if something impossible was sampled."""
    counts = Counter(samples)
    total = counts.total()
    if any(law.get(sample, 0.0) == 0.0 for sample in counts):
        return 0.0
    cells: list[tuple[float, int]] = []
    expected, observed = 0.0, 0
    for sample, p in sorted(law.items(), key=lambda item: -item[1]):
        expected += p * total
        observed += counts[sample]
        if expected >= MIN_EXPECTED:
            cells.append((expected, observed))
            expected, observed = 0.0, 0
    if cells and expected:  # the remainder joins the last cell
        last = cells.pop()
        cells.append((last[0] + expected, last[1] + observed))
    statistic = sum((o - e) ** 2 / e for e, o in cells)
    half_degrees = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half_degrees, torch.tensor(statistic / 2, dtype=torch.float64)))
