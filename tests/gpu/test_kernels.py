# SPDX-License-Identifier: Apache-2.0
"""The kernels, compiled, on a GPU: the comparisons that ``tests/v2/kernels`` makes under the interpreter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch

if not (torch.cuda.is_available() and torch.version.cuda):
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from tests.v2.kernels import cost_aware_cases, logits_cases, runs_cases, threshold_cases
from vllm_specdecpp.decision import tails
from vllm_specdecpp.decision.cost_aware import device_runs
from vllm_specdecpp.decision.tail_params import CostAwareParams
from vllm_specdecpp.kernels import runs
from vllm_specdecpp.kernels.cost_aware_tail import cost_aware_tail
from vllm_specdecpp.kernels.logits_summary import logits_summary, logits_summary_torch
from vllm_specdecpp.kernels.threshold_tail import threshold_tail

pytestmark = pytest.mark.gpu


def on_gpu(launch: Callable[..., Any], captured: bool = False) -> Callable[..., Any]:
    """``launch`` with CPU tensors: on copies of the same strides, whose contents come back, and so does its result.

    Args:
        launch: the launcher or its twin.
        captured: replay it from a CUDA graph.
    """

    def back(value: Any) -> Any:
        if isinstance(value, tuple):
            parts = map(back, value)
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        return value.cpu() if isinstance(value, torch.Tensor) else value

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

        def move(value: Any) -> Any:
            if isinstance(value, CostAwareParams):
                return dataclasses.replace(value, **{f.name: move(getattr(value, f.name)) for f in fields(value)})
            if isinstance(value, tuple):
                return type(value)(*map(move, value))
            if not isinstance(value, torch.Tensor):
                return value
            copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
            pairs.append((value, copy))
            return copy.copy_(value)

        moved, named = [move(value) for value in args], {name: move(value) for name, value in kwargs.items()}
        result = launch(*moved, **named)
        if captured:  # the call before was the warm-up: start again from the same contents
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                launch(*moved, **named)
            for value, copy in pairs:
                copy.copy_(value)
            graph.replay()
        for value, copy in pairs:
            value.copy_(copy)
        return back(result)

    return wrapped


@pytest.mark.parametrize("launch", [threshold_tail, tails.threshold_tail])
@pytest.mark.parametrize("case", threshold_cases.CASES, ids=str)
def test_threshold_tail(case, launch) -> None:
    threshold_cases.check_rounds(on_gpu(launch), case)


@pytest.mark.parametrize("launch", [cost_aware_tail, tails.cost_aware_tail])
@pytest.mark.parametrize("case", cost_aware_cases.CASES, ids=str)
def test_cost_aware_tail(case, launch) -> None:
    cost_aware_cases.check_rounds(on_gpu(launch), case)


@pytest.mark.parametrize("launch", [logits_summary, logits_summary_torch])
@pytest.mark.parametrize("case", logits_cases.CASES, ids=str)
def test_logits_summary(case, launch) -> None:
    logits_cases.check(on_gpu(launch), case)


@pytest.mark.parametrize("module", [runs, device_runs])
def test_runs(module) -> None:
    runs_cases.check_takes(on_gpu(module.take_runs))
    runs_cases.check_behind(on_gpu(module.behind_drafts))


@pytest.mark.parametrize("captured", [threshold_tail, tails.threshold_tail])
def test_replayed_from_a_graph(captured) -> None:
    threshold_cases.check_rounds(on_gpu(captured, captured=True), threshold_cases.Case(5))


@pytest.mark.parametrize("captured", [cost_aware_tail, tails.cost_aware_tail])
def test_cost_aware_tail_replayed_from_a_graph(captured) -> None:
    cost_aware_cases.check_rounds(on_gpu(captured, captured=True), cost_aware_cases.Case(5))
