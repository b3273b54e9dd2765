# SPDX-License-Identifier: Apache-2.0
"""Free runs without a draft model, on Model Runner V1: the proposer's rounds, in which nobody drafts.

To vLLM the target is its own draft model (``engine.options``), which is never loaded: no weights, no KV, no passes.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_specdecpp.costs import timing
from vllm_specdecpp.costs.model import Points
from vllm_specdecpp.engine.v1.proposer import SpecDecPPProposer
from vllm_specdecpp.engine.v1.timing import SinglePasses


class RunsOnlyProposer(SpecDecPPProposer):
    """Proposes runs; same arguments."""

    can_catch_up = True  # nothing has to be read

    def load_model(self, target_model: torch.nn.Module) -> None:
        """There is nothing to load.

        Raises:
            ValueError: single passes of this target cannot be timed.
        """
        if self.runner.supports_mm_inputs or self.runner.uses_mrope or self.vllm_config.lora_config is not None:
            raise ValueError(
                f"specdecpp: sources={self.config.sources} without a draft model needs Model Runner V2 for targets "
                "that take images or LoRA adapters; set VLLM_USE_V2_MODEL_RUNNER=1, or add a draft model"
            )
        self._draft_attn_layer_names: set[str] = set()
        self.hidden_states: torch.Tensor = self.hidden_states[:0].clone()  # vLLM makes it for a draft model
        self.set_rule(self.config)

    def initialize_attn_backend(self, *args: Any, **kwargs: Any) -> None:
        """Nor is there any attention; rounds go by the target's blocks."""
        self.block_size = self.vllm_config.cache_config.block_size

    def initialize_cudagraph_keys(self, *args: Any, **kwargs: Any) -> None:
        """No graphs."""

    def dummy_run(self, *args: Any, **kwargs: Any) -> None:
        """No passes."""

    def measure_costs(self) -> Points:
        """Time the target alone."""
        scheduler, bound = self.vllm_config.scheduler_config, self.speculative_config.num_speculative_tokens
        return timing.measure_target(SinglePasses(self), scheduler, bound, self.agree, self.seconds_so_far())
