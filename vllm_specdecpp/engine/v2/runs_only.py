# SPDX-License-Identifier: Apache-2.0
"""Free runs without a draft model, on Model Runner V2: the speculator's rounds, in which nobody drafts.

To vLLM the target is its own draft model (``engine.options``), which is never loaded: no weights, no KV, no passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vllm_specdecpp.costs import timing as costs_timing
from vllm_specdecpp.costs.model import Points
from vllm_specdecpp.engine.v2 import timing
from vllm_specdecpp.engine.v2.cost_aware import DeviceCostAware, Plan
from vllm_specdecpp.engine.v2.graphs import EAGER
from vllm_specdecpp.engine.v2.speculator import SpecDecPPSpeculator


class _NoDraftKV:
    """In the place of ``DraftKVGaps``: nothing is ever behind."""

    can_catch_up = True

    def nothing(self, *args: Any) -> None:
        """For :meth:`DraftKVGaps.arrive`, ``told`` and ``leave_out``."""

    arrive = told = leave_out = nothing

    def missing(self, request_ids: Sequence[str]) -> list[int]:
        return [0] * len(request_ids)

    def num_behind(self, input_batch: Any, next_positions: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(next_positions[: input_batch.num_reqs])


class RunsOnlySpeculator(SpecDecPPSpeculator):
    """Proposes runs; same arguments."""

    model = None  # vLLM asks for it when the engine sleeps

    def load_model(self, target_model: torch.nn.Module) -> None:
        """There is nothing to load."""
        self.draft_attn_layer_names: set[str] = set()
        self.supports_mm_inputs = False
        self.set_rule(self.config)

    def set_attn(self, *args: Any, **kwargs: Any) -> None:
        """Nor is there any attention."""
        self.attn_groups: list[Any] = []
        self.gaps: Any = _NoDraftKV()

    def graph_mode(self) -> tuple[str, str]:
        """No draft pass is captured; the target's graphs are vLLM's and ``verify_graphs``'."""
        return EAGER, "there is no draft model"

    def warm_prefill(self) -> None:
        """No prompt is read."""

    def measure_costs(self) -> Points:
        """Time the target alone."""
        passes = timing.V2Passes(self)
        with passes.adapters():
            return costs_timing.measure_target(
                passes, self.scheduler_config, self.num_speculative_steps, self.agree, self.seconds_so_far()
            )

    def _plan(self, costs: DeviceCostAware | None, input_batch: Any, limits: np.ndarray) -> Plan:
        """Nobody drafts, not even while the costs are not known."""
        return Plan(0, (), reads=False) if costs is None else super()._plan(costs, input_batch, limits)

    def _dummy_round(self, *args: Any) -> None:
        """No passes."""
