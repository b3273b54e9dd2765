# SPDX-License-Identifier: Apache-2.0
"""Between the rows of one draft step, of the requests that still run, and those of the batch. No vLLM import."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import torch


def select_rows(metadata: Any, rows: torch.Tensor) -> Any:
    """vLLM's ``SamplingMetadata`` of some rows, as far as drawing candidates reads it."""
    temperature = metadata.temperature
    return dataclasses.replace(metadata, temperature=None if temperature is None else temperature[rows])


def draft_greedily(metadata: Any, rows: Collection[int]) -> Any:
    """vLLM's ``SamplingMetadata``, by which the requests of these rows draft their likeliest candidates."""
    if not rows:
        return metadata
    index = torch.tensor(list(rows), device=metadata.temperature.device)
    temperature = metadata.temperature.index_fill(0, index, 0.0)  # [num_reqs]
    all_greedy = len(rows) == len(temperature)
    return dataclasses.replace(metadata, temperature=temperature, all_random=False, all_greedy=all_greedy)


def scatter(values: torch.Tensor, rows: torch.Tensor, num_reqs: int, fill: int) -> torch.Tensor:
    """``values`` at ``rows``, ``fill`` elsewhere: [num_reqs, ...]."""
    if values.shape[0] == num_reqs:
        return values
    out = values.new_full((num_reqs, *values.shape[1:]), fill)
    out[rows] = values
    return out


def ragged(drawn: list[torch.Tensor], lengths: torch.Tensor) -> list[list[int]]:
    """Per-step columns to per-request lists."""
    if not drawn:
        return [[] for _ in range(lengths.shape[0])]
    table = torch.stack(drawn, dim=1).tolist()  # [num_reqs, num_steps]
    return [tokens[:length] for tokens, length in zip(table, lengths.tolist(), strict=True)]
