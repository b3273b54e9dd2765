# SPDX-License-Identifier: Apache-2.0
"""Single passes of the draft model on Model Runner V1: vLLM's proposer, run by our inputs at the cheapest width."""

from __future__ import annotations

from typing import Any

import torch
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.spec_decode.draft_model import DraftModelProposer

from vllm_specdecpp.costs.widths import Rows, padded
from vllm_specdecpp.engine.shared.drafter import Drafter
from vllm_specdecpp.engine.shared.round_log import RoundLog
from vllm_specdecpp.engine.v1 import target_widths
from vllm_specdecpp.engine.v1.inputs import DraftInputs
from vllm_specdecpp.engine.v1.timing import SinglePasses

logger = init_logger("vllm.specdecpp")


class DraftPasses(Drafter, DraftModelProposer):
    """vLLM's draft model, pass by pass.

    Attributes:
        log: counts the passes.
    """

    num_speculative_tokens: int
    log: RoundLog
    runner: Any

    def pad(self, rows: Rows) -> None:
        """See :meth:`Drafter.pad`."""
        if SinglePasses(self).target_to_draft is not None:  # the file may be of another engine of the pair
            rows = {name: widths for name, widths in rows.items() if name != "target"}
        super().pad(rows)
        target_widths.pad_to(self.runner, self.rows.get("target", ()))
        if self.rows:
            logger.info("specdecpp: passes of 1, 2, ... rows run with these: %s", self.rows)

    def dummy_run(self, *args: Any, **kwargs: Any) -> None:
        """One pass instead of vLLM's K_max equal ones: at K_max 20 those take minutes of every start on a CPU."""
        kept, self.num_speculative_tokens = self.num_speculative_tokens, 1
        try:
            super().dummy_run(*args, **kwargs)
        finally:
            self.num_speculative_tokens = kept

    def _run_draft_model(self, inputs: DraftInputs, block_table: torch.Tensor, draft_index: int) -> torch.Tensor:
        """One forward pass; returns the last hidden states, after the final norm: [num_tokens, hidden_size]."""
        num_tokens = inputs.token_ids.shape[0]
        self.input_ids[:num_tokens] = inputs.token_ids
        self.positions[:num_tokens] = inputs.positions
        lengths = inputs.query_start_loc.diff()
        metadata = CommonAttentionMetadata(
            query_start_loc=inputs.query_start_loc.to(self.device),
            query_start_loc_cpu=inputs.query_start_loc,
            seq_lens=inputs.seq_lens.to(self.device),
            seq_lens_cpu_upper_bound=inputs.seq_lens,
            num_reqs=len(lengths),
            num_actual_tokens=num_tokens,
            max_query_len=int(lengths.max()),
            max_seq_len=int(inputs.seq_lens.max()),
            block_table_tensor=block_table,
            slot_mapping=inputs.slot_mapping,
        )
        mode, num_input_tokens, num_tokens_across_dp = self._determine_batch_execution_and_padding(
            padded(self.rows.get("draft", ()), num_tokens)
        )
        _, per_layer = self.build_per_group_and_layer_attn_metadata(metadata, draft_index=draft_index)
        model_kwargs, slot_mapping_size = self.build_model_inputs_first_pass(num_tokens, num_input_tokens, None)
        with set_forward_context(
            per_layer,
            self.vllm_config,
            num_tokens=num_input_tokens,
            num_tokens_across_dp=num_tokens_across_dp,
            cudagraph_runtime_mode=mode,
            slot_mapping=self._get_slot_mapping(slot_mapping_size, metadata.slot_mapping),
        ):
            hidden_states = self.model(**model_kwargs)
        self.log.draft_pass()
        return hidden_states[:num_tokens]

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The draft's logits [num_rows, vocab_size] from its hidden states [num_rows, hidden_size]."""
        num_rows = hidden_states.shape[0]
        if (width := padded(self.rows.get("logits", ()), num_rows)) > num_rows:
            padding = hidden_states.new_zeros(width - num_rows, hidden_states.shape[1])
            hidden_states = torch.cat([hidden_states, padding])
        return self.model.compute_logits(hidden_states)[:num_rows]
