# SPDX-License-Identifier: Apache-2.0
"""Single passes of the draft model on Model Runner V1: vLLM's proposer, run by our inputs at the cheapest width."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.spec_decode.draft_model import DraftModelProposer

from vllm_specdecpp.config import SpecDecPPConfig
from vllm_specdecpp.engine.shared.drafter import Drafter
from vllm_specdecpp.engine.shared.round_log import RoundLog
from vllm_specdecpp.engine.shared.widths import MAX_ROWS, RowWidths, measure
from vllm_specdecpp.engine.v1.inputs import DraftInputs
from vllm_specdecpp.engine.v1.timing import SinglePasses

logger = init_logger("vllm.specdecpp")


class DraftPasses(Drafter, DraftModelProposer):
    """vLLM's draft model, pass by pass.

    Attributes:
        log: counts the passes.
        pass_widths: cheapest number of rows of a forward pass.
        logits_widths: likewise of the lm_head.
    """

    num_speculative_tokens: int
    log: RoundLog

    def __init__(self, vllm_config: VllmConfig, device: torch.device, config: SpecDecPPConfig, runner: Any) -> None:
        super().__init__(vllm_config, device, config, runner)
        self.pass_widths, self.logits_widths = RowWidths(), RowWidths()

    def measure_widths(self) -> None:
        """Time the draft model's passes at small widths; call once the model is compiled. GPUs pad to their graphs."""
        if self.device.type != "cpu":
            return
        passes, most = SinglePasses(self), min(MAX_ROWS, self.max_num_tokens)
        times = [measure(passes.draft, most), measure(passes.draft_logits, most)]
        tables = self.agree(torch.tensor(times, dtype=torch.float64))  # ranks that pad differently would not meet
        self.pass_widths, self.logits_widths = (RowWidths(table) for table in tables.tolist())
        chosen = [self.pass_widths.cheapest(n) for n in range(1, most + 1)]
        logger.info("specdecpp: draft passes of 1 to %d rows run with %s rows", most, chosen)

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
            self.pass_widths.cheapest(num_tokens)
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
        """The draft's logits [num_rows, num_columns] from its hidden states [num_rows, hidden_size]."""
        num_rows = hidden_states.shape[0]
        if (width := self.logits_widths.cheapest(num_rows)) > num_rows:
            padding = hidden_states.new_zeros(width - num_rows, hidden_states.shape[1])
            hidden_states = torch.cat([hidden_states, padding])
        return self.model.compute_logits(hidden_states)[:num_rows]
