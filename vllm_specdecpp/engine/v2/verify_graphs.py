# SPDX-License-Identifier: Apache-2.0
"""Full CUDA graphs for verifications of every length: the target's own, captured by vLLM.

With speculation vLLM captures full graphs of K + 1 tokens of each request alone. A round without candidates, or with
different numbers of them, would run piecewise. What it captures here besides:

* one token of each request, exactly the graphs of an engine without speculation: K = 0 costs what off costs;
* where the attention backend can replay any mix of 1 to K + 1 tokens a request: graphs of such mixes, in the place of
  those of K + 1 tokens each (vLLM's ``varlen_decode``);
* elsewhere: a single request at each length. Different lengths in one batch run piecewise there.

With adaptive verification vLLM captures such mixes itself, and books at least two tokens of each request, so no batch
would find the graphs of one token: its own manager stays.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import product
from typing import Any

from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu.attn_utils import get_varlen_cudagraph_unsupported_backend
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, ModelCudaGraphManager


class VerifyGraphs(ModelCudaGraphManager):
    """vLLM's manager with these graphs; same arguments."""

    def _init_candidates(self) -> None:
        super()._init_candidates()
        full = self._capture_descs.get(CUDAGraphMode.FULL)
        # In the mode FULL one kind of graph serves every batch.
        if not full or not self.cudagraph_mode.separate_routine():
            return
        for loras, length in product(self.lora_capture_cases, self._lengths()):
            fewest = 0
            for num_reqs in self._batch_sizes(length):
                num_tokens = num_reqs * length
                more = BatchExecutionDescriptor(
                    CUDAGraphMode.FULL, num_tokens, num_reqs, uniform_token_count=length, num_active_loras=loras
                )
                if more not in full:  # a user's table of lengths by batch size has some of them captured
                    full.append(more)
                    for fitting in range(fewest, num_tokens + 1):
                        self._candidates.setdefault((fitting, loras), []).insert(0, more)
                fewest = num_tokens + 1
        full.sort(key=lambda d: d.num_tokens, reverse=True)  # the largest first: the others fit into its memory

    def _lengths(self) -> list[int]:
        """Tokens a request of which there are graphs of their own."""
        return [1] if self.varlen_decode else list(range(1, self.decode_query_len))

    def _batch_sizes(self, length: int) -> list[int]:
        """Requests of such graphs, ascending."""
        sizes = self.compilation_config.cudagraph_capture_sizes or []
        largest = min(self.max_num_reqs, max(sizes))
        if length > 1:
            return [1] if length <= max(sizes) else []
        return sorted({size for size in sizes if size < largest} | {largest})

    def describe(self) -> str:
        """What is captured, for the log."""
        full = self._capture_descs.get(CUDAGraphMode.FULL)
        if not full:
            return f"without full CUDA graphs, K = 0 too: cudagraph_mode is {self.cudagraph_mode.name}"
        if self.varlen_decode or not self.cudagraph_mode.separate_routine():
            lengths = "of any lengths"
        else:
            lengths = f"of 1 or {self.decode_query_len} tokens each, or of one request; other mixes run piecewise"
        return f"in {len(full)} full CUDA graphs of up to {full[0].num_tokens} tokens, {lengths}"


def widen(runner: Any, mode: CUDAGraphMode, draft_layers: Collection[str]) -> str:
    """Put :class:`VerifyGraphs` in the place of the manager that the runner has just made.

    Args:
        runner: a ``GPUModelRunner`` of Model Runner V2, its attention backends known, nothing captured yet.
        mode: as vLLM has resolved it.
        draft_layers: names of the draft model's attention layers.

    Returns:
        What the target's verifications run in, for the log.
    """
    manager = getattr(runner, "cudagraph_manager", None)
    if manager is None or not manager.needs_capture():
        return "without CUDA graphs"
    special = {
        "adaptive verification": manager.varlen_decode or None,
        "microbatches": manager.ubatch_runner,
        "prefill context parallelism": runner.pcp_manager,
        "kv_sharing_fast_prefill": runner.fast_prefill,
    }
    if names := [name for name, used in special.items() if used is not None]:
        return f"in vLLM's own CUDA graphs, for {names[0]}"
    runner.cudagraph_manager = VerifyGraphs(
        runner.vllm_config,
        runner.device,
        mode,
        decode_query_len=runner.decode_query_len,
        lora_capture_cases=runner.lora_capture_cases,
        varlen_decode=_takes_any_lengths(runner, draft_layers),
    )
    return runner.cudagraph_manager.describe()


def _takes_any_lengths(runner: Any, draft_layers: Collection[str]) -> bool:
    """Whether every attention backend of the target can replay batches of different lengths."""
    layers = {name for groups in runner.attn_groups for group in groups for name in group.layer_names}
    refused = get_varlen_cudagraph_unsupported_backend(
        runner.attn_groups, runner.vllm_config, runner.decode_query_len, checked_layer_names=layers - set(draft_layers)
    )
    further, _ = runner.model_state.get_additional_cg_support()
    return refused is None and further == AttentionCGSupport.ALWAYS
