# SPDX-License-Identifier: Apache-2.0
"""Single passes of both models on Model Runner V1, to be timed: right shapes, no requests, no attention, no KV."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.forward_context import set_forward_context

from vllm_specdecpp.costs.model import Points
from vllm_specdecpp.costs.widths import Rows, cheapest_rows, padded


class SinglePasses:
    """Runs one pass of a given width, padded as in a real round, and waits for the device.

    Args:
        proposer: ``SpecDecPPProposer``, its model loaded; its input buffers are used.
    """

    def __init__(self, proposer: Any) -> None:
        self._proposer = proposer
        self._runner: Any = proposer.runner

    @torch.inference_mode()
    def draft(self, num_rows: int) -> None:
        """The draft model's forward pass."""
        proposer = self._proposer
        mode, width, across_dp = proposer._determine_batch_execution_and_padding(
            padded(proposer.rows.get("draft", ()), num_rows)
        )
        with set_forward_context(
            None, proposer.vllm_config, num_tokens=width, num_tokens_across_dp=across_dp, cudagraph_runtime_mode=mode
        ):
            proposer.model(**proposer.build_model_inputs_first_pass(num_rows, width, None)[0])
        self._synchronize()

    @torch.inference_mode()
    def draft_logits(self, num_rows: int) -> None:
        """The draft model's lm_head."""
        self._proposer.compute_logits(self._proposer.hidden_states[:num_rows])
        self._synchronize()

    @torch.inference_mode()
    def target(self, num_rows: int) -> None:
        """The target's forward pass and lm_head."""
        runner = self._runner
        mode, descriptor, _, across_dp, *_ = runner._determine_batch_execution_and_padding(
            num_tokens=num_rows,
            num_reqs=1,
            num_scheduled_tokens_np=np.array([num_rows], dtype=np.int32),
            max_num_scheduled_tokens=num_rows,
        )
        width = descriptor.num_tokens
        with set_forward_context(
            None,
            self._proposer.vllm_config,
            num_tokens=width,
            num_tokens_across_dp=across_dp,
            cudagraph_runtime_mode=mode,
            batch_descriptor=descriptor,
        ):
            hidden_states = runner.model(input_ids=runner.input_ids.gpu[:width], positions=runner.positions[:width])
        runner.model.compute_logits(hidden_states[:num_rows])
        self._synchronize()

    def pad(self, times: Points) -> Rows:
        """Run a few rows at the cheapest of these widths from now on; GPUs pad to their graphs."""
        proposer = self._proposer
        if proposer.device.type == "cpu":
            proposer.pad({name: cheapest_rows(seconds) for name, seconds in times.items()})
        return dict(proposer.rows)

    @property
    def target_to_draft(self) -> float | None:
        """How many times as large as the draft's weights the target's are, if :meth:`target` cannot be run; else None.

        It cannot where the target takes more than token ids, nor with LoRA adapters, whose kernels ask for requests.
        """
        runner = self._runner
        if not (runner.supports_mm_inputs or runner.uses_mrope or runner.vllm_config.lora_config is not None):
            return None
        sizes = [
            sum(weight.numel() * weight.element_size() for weight in model.parameters())
            for model in (runner.model, self._proposer.model)
        ]
        return sizes[0] / sizes[1]

    def _synchronize(self) -> None:
        if self._proposer.device.type == "cuda":
            torch.cuda.synchronize(self._proposer.device)
