# SPDX-License-Identifier: Apache-2.0
"""The passes of the draft model on Model Runner V2, on buffers that keep their address.

A round is a first pass and any number of later ones; what is here never waits for the device, so that each can be
recorded in a CUDA graph (``engine.v2.graphs``) as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.utils import torch_utils
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator, prepare_prefill_inputs

from vllm_specdecpp.config import SpecDecPPConfig
from vllm_specdecpp.engine.shared.draft_limit import draft_limit
from vllm_specdecpp.engine.shared.drafter import Drafter
from vllm_specdecpp.engine.v2.kv import Span
from vllm_specdecpp.engine.v2.round import DeviceRound

SHORT = 2
"""Tokens a request that the short first pass reads."""


class DraftPasses(Drafter, StandaloneARSpeculator):
    """vLLM's standalone draft model, pass by pass.

    Attributes:
        round: what is known of each request of the batch.
        runner: the ``GPUModelRunner`` that owns this speculator.
        draft_limit: positions that the draft model has.
    """

    runner: Any

    def __init__(self, vllm_config: VllmConfig, device: torch.device, config: SpecDecPPConfig) -> None:
        super().__init__(vllm_config, device, config)
        self.draft_limit = draft_limit(vllm_config)
        # Our own estimates size the verification, where vLLM would fit a model of its own.
        self.use_acceptance_estimator = False
        confidences = self.draft_token_confidence_probs if self.enable_adaptive_verification else None
        self.round = DeviceRound(self.draft_tokens, confidences, self.agree if self._num_ranks > 1 else None)
        self._short_tokens = torch.zeros(self.max_num_reqs, SHORT, dtype=torch.int32, device=device)
        self._back = torch.arange(SHORT - 1, -1, -1, device=device)
        self._writing = torch.full_like(self.idx_mapping, -1)  # [max_num_reqs] request state, -1 where no KV is written
        self._step = 1

    def warm_prefill(self) -> None:
        """Compile what vLLM prepares the reading of prompts with, between two rounds: one kernel for each power of two
        up to 512 tokens, of which its own warm-up has the first few."""
        none = torch.zeros(1, dtype=torch.int32, device=self.device)
        last_sampled = torch.zeros(self.max_num_reqs, 1, dtype=torch.int64, device=self.device)
        for power in range(2, 10):
            batch = InputBatch.make_dummy(1, min(2**power - 2, self.max_num_tokens), self.input_buffers)
            prepare_prefill_inputs(
                self.input_buffers, batch, last_sampled, none, self.expanded_input_ids, self.expanded_positions,
                self.last_token_indices, self.max_num_reqs, self.max_model_len,
            )  # fmt: skip

    def _can_read_short(self, input_batch: Any) -> bool:
        """Whether two tokens a request bring the draft model's KV up to date.

        Its KV of accepted candidates is in its cache, except that of the one that was drawn last and never fed back:
        so the last verified token and the one after it are enough, whatever the candidate length was, once the
        request's prompt and a first round are behind it. vLLM re-reads the whole verified window.
        """
        return not input_batch.is_prefilling_np.any() and input_batch.num_reqs * SHORT <= self.max_num_tokens

    def _stage_short(self, input_batch: Any, num_rejected: torch.Tensor, last_sampled: torch.Tensor) -> None:
        """Take from vLLM's batch the tokens that the short first pass reads."""
        rows = slice(input_batch.num_reqs)
        starts = input_batch.query_start_loc[1 : input_batch.num_reqs + 1]
        last_verified = starts - num_rejected[rows] - 1  # [num_reqs] index into what the target has just read
        self._short_tokens[rows, 0] = input_batch.input_ids[last_verified]
        self._short_tokens[rows, 1] = last_sampled.view(-1)[input_batch.idx_mapping]

    def _load_short(self, num_reqs: int) -> None:
        """Point the input buffers at the last verified token and the one after it."""
        buffers, num_tokens = self.input_buffers, num_reqs * SHORT
        positions = self.round.next_positions[:num_reqs].clamp(1, self.max_model_len - 1)
        buffers.input_ids[:num_tokens].view(num_reqs, SHORT).copy_(self._short_tokens[:num_reqs])
        torch.sub(positions[:, None], self._back, out=buffers.positions[:num_tokens].view(num_reqs, SHORT))
        torch.add(positions, 1, out=buffers.seq_lens[:num_reqs])
        torch.mul(self.arange_gpu[: num_reqs + 1], SHORT, out=buffers.query_start_loc[: num_reqs + 1])
        self._writing[:num_reqs] = self.idx_mapping[:num_reqs]

    def _load_candidates(self, num_reqs: int) -> None:
        """Point the input buffers at each running request's last candidate; stopped ones write no KV."""
        rows, state, buffers = slice(num_reqs), self.round, self.input_buffers
        running = state.running[rows] > 0  # [num_reqs]
        # The token that the target emitted last stands at next_positions, candidate j at j positions after it.
        positions = (state.next_positions[rows] + state.lengths[rows]).clamp_(max=self.max_model_len - 1)
        torch.mul(state.token_ids[rows], running, out=buffers.input_ids[rows])
        buffers.positions[rows] = positions
        torch.add(positions, 1, out=buffers.seq_lens[rows])
        buffers.query_start_loc[: num_reqs + 1] = self.arange_gpu[: num_reqs + 1]
        self._writing[rows] = torch.where(running, self.idx_mapping[rows], -1)

    def _map_slots(self, num_reqs: int, query_len: int) -> torch.Tensor:
        """Slots of the loaded tokens, in vLLM's own buffer: [num_kv_cache_groups, num_tokens]."""
        starts, num_tokens = self.input_buffers.query_start_loc[: num_reqs + 1], num_reqs * query_len
        positions = self.input_buffers.positions[:num_tokens]
        return self.block_tables.compute_slot_mappings(self._writing[:num_reqs], starts, positions, num_tokens)

    def _metadata(
        self, num_reqs: int, query_len: int, seq_lens_cpu_upper_bound: torch.Tensor, step: int, mode: CUDAGraphMode
    ) -> Any:
        """Attention metadata by layer of a pass that reads ``query_len`` tokens of each request."""
        return self._build_uniform_attn_metadata(
            batch_desc=BatchExecutionDescriptor(mode, num_reqs * query_len, num_reqs, uniform_token_count=query_len),
            num_reqs=num_reqs,
            num_query_per_req=query_len,
            seq_lens_cpu_upper_bound=seq_lens_cpu_upper_bound,
            step=step,  # tokens beyond what the target has read: the one that it emitted, and step - 1 candidates
        )

    def _eager_pass(self, input_batch: Any, query_len: int, skip_attn: bool = False) -> None:
        """Run a loaded pass with attention metadata of its own."""
        num_reqs, metadata, slot_mappings = input_batch.num_reqs, None, None
        if not skip_attn:
            slot_mappings = build_slot_mappings_by_layer(self._map_slots(num_reqs, query_len), self.kv_cache_config)
            bound = input_batch.seq_lens_cpu_upper_bound
            metadata = self._metadata(num_reqs, query_len, bound, self._step, CUDAGraphMode.NONE)
        self._run_pass(num_reqs, query_len, metadata, slot_mappings)

    def read_spans(self, input_batch: Any, spans: Sequence[Span], bases: torch.Tensor) -> torch.Tensor:
        """A pass that draws nothing: the draft model reads tokens that the target has read before.

        Args:
            input_batch: of the step.
            spans: positions of each request of the batch; at an empty one a token is read whose KV goes nowhere.
            bases: [num_reqs] int64, what each request's positions are counted from.

        Returns:
            [num_kv_cache_groups, num_tokens] the slots that were written, -1 for none.
        """
        num_reqs, buffers = input_batch.num_reqs, self.input_buffers
        begins = self.on_device(np.array([start for start, _ in spans])) + bases  # [num_reqs]
        counts = np.array([max(end - start, 1) for start, end in spans], dtype=np.int32)  # [num_reqs]
        query_starts = np.concatenate([[0], counts.cumsum()]).astype(np.int32)
        num_tokens = int(query_starts[-1])
        of_row = np.repeat(np.arange(num_reqs), counts)
        rows = self.on_device(of_row)
        positions = begins[rows] + self.on_device(np.arange(num_tokens) - query_starts[of_row])  # [num_tokens] int64
        states = input_batch.idx_mapping[rows]
        reads = self.on_device(np.array([end > start for start, end in spans]))  # [num_reqs]
        buffers.input_ids[:num_tokens] = self.runner.req_states.all_token_ids.gpu[states, positions]
        buffers.positions[:num_tokens] = positions
        buffers.query_start_loc[: num_reqs + 1] = self.on_device(query_starts)
        buffers.seq_lens[:num_reqs] = begins + self.on_device(counts)
        self._writing[:num_reqs] = torch.where(reads, input_batch.idx_mapping, -1)
        slots = self.block_tables.compute_slot_mappings(
            self._writing[:num_reqs], buffers.query_start_loc[: num_reqs + 1], buffers.positions[:num_tokens],
            num_tokens,
        )  # fmt: skip
        metadata = self._build_attn_metadata(
            num_reqs=num_reqs,
            batch_desc=BatchExecutionDescriptor(CUDAGraphMode.NONE, num_tokens, num_reqs),
            query_start_loc_np=query_starts,
            seq_lens_cpu_upper_bound=input_batch.seq_lens_cpu_upper_bound[:num_reqs],
            step=0,
            slot_mappings=slots,
        )
        by_layer = build_slot_mappings_by_layer(slots, self.kv_cache_config)
        self._run_model(buffers.input_ids[:num_tokens], buffers.positions[:num_tokens], metadata, by_layer, None)
        return slots

    def on_device(self, array: Sequence[int] | np.ndarray) -> torch.Tensor:
        """A copy on the draft model's device that is not waited for."""
        return torch_utils.async_tensor_h2d(np.asarray(array), device=self.device)

    def _run_model(self, input_ids: torch.Tensor, positions: torch.Tensor, *args: Any) -> torch.Tensor:
        """As vLLM's, but never at a position that the draft model does not have: [num_tokens, hidden_size].

        What a request has beyond is read at the last one. Its KV goes where no request that drafts looks.
        """
        if self.draft_limit < self.max_model_len:
            positions = positions.clamp(max=self.draft_limit - 1)
        hidden_states: torch.Tensor = super()._run_model(input_ids, positions, *args)
        return hidden_states

    def _run_pass(self, num_reqs: int, query_len: int, metadata: Any, slot_mappings: Any) -> None:
        """The model over the loaded tokens, and the draw of candidate ``_step`` after each request's last one."""
        buffers, num_tokens = self.input_buffers, num_reqs * query_len
        positions = buffers.positions[:num_tokens]
        hidden_states = self._run_model(buffers.input_ids[:num_tokens], positions, metadata, slot_mappings, None)
        last = slice(query_len - 1, num_tokens, query_len)
        self.current_draft_step.fill_(self._step - 1)
        self.sample_draft(
            hidden_states[last].contiguous(),
            positions[last].contiguous(),
            self.idx_mapping[:num_reqs],
            self.temperature,
            self.seeds,
            self.current_draft_step,
            self.draft_logits,
        )

    def compute_draft_logits(self, hidden_states: torch.Tensor, spec_step_idx: int) -> torch.Tensor:
        """The draft's logits [num_reqs, vocab_size]; the rule scores them here, before anything is drawn from them."""
        logits = super().compute_draft_logits(hidden_states, spec_step_idx)
        self.round.observe_pass(self._step, logits, hidden_states)
        return logits

    def sample_draft(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Draw a candidate as vLLM does, and submit it for the requests that still draft: [num_reqs], -1 elsewhere."""
        token_ids = super().sample_draft(*args, **kwargs).long()
        return self.round.append_drawn(token_ids)
