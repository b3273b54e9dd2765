# SPDX-License-Identifier: Apache-2.0
"""Whether and how draft rounds are captured in CUDA graphs (``engine.v2.graphs`` holds the graphs themselves)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from vllm.compilation.cudagraph_pool import capture_pool
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.distributed.parallel_state import get_tp_group, graph_capture
from vllm.v1.worker.gpu.cudagraph_utils import prepare_inputs_to_capture

from vllm_specdecpp.config import SpecDecPPConfig
from vllm_specdecpp.decision.cost_aware.tail import CostAwareTail
from vllm_specdecpp.engine.v2 import graphs, verify_graphs
from vllm_specdecpp.engine.v2.booked_rows import BookedRows
from vllm_specdecpp.engine.v2.passes import SHORT, DraftPasses


class CapturedRounds(DraftPasses):
    """The part of the speculator that vLLM asks to capture.

    Attributes:
        graphs: the captured rounds, of the KV cache in force; None where rounds run eagerly.
        booked_rows: with adaptive verification, of the KV cache in force; else None.
        how_verified: which graphs the target's verifications run in; for the start-up log.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, config: SpecDecPPConfig) -> None:
        super().__init__(vllm_config, device, config)
        self.graphs: graphs.DraftGraphs | None = None
        self.booked_rows: BookedRows | None = None
        self._full_graphs = False
        self._loaded: np.ndarray | None = None  # what ``round.limits`` holds, if it is of a batch
        self._mode = graphs.EAGER, "vLLM captured no graphs"
        self.how_verified = "without CUDA graphs"

    def open(self) -> None:
        """Let everybody draft as far as they may: for warm-up and capture, and while the costs are not known."""
        if isinstance(self.round.rule, CostAwareTail):
            self.round.rule.open()
        self.round.admit()

    @property
    def any_running(self) -> torch.Tensor:
        """[1] bool, see ``graphs.Rounds``."""
        return self.round.any_running

    def set_attn(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's; a new KV cache begins, and no graph of the last one may be replayed any more."""
        self.drop_graphs("vLLM made a new KV cache and has not captured again")
        super().set_attn(*args, **kwargs)

    def drop_graphs(self, reason: str) -> None:
        """Run draft rounds eagerly from now on, until the next :meth:`capture`."""
        if self.graphs is not None:
            self.graphs = None
            torch.accelerator.empty_cache()  # their pool's memory may be wanted outside of torch's allocator
        self._mode = graphs.EAGER, reason

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Note whether vLLM captures full graphs of decode steps; ours are captured with them.

        vLLM calls it for each KV cache: the small one that it measures memory with, which it frees, then the real one.
        """
        self._full_graphs = cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        self.how_verified = verify_graphs.widen(self.runner, cudagraph_mode, self.draft_attn_layer_names)
        manager = getattr(self.runner, "adaptive_verification", None)
        self.booked_rows = None if manager is None else BookedRows(manager, bool(self.config.run_sources))

    def _book(self, limits: np.ndarray, drafts: Sequence[int]) -> None:
        """Tell adaptive verification which rows draft, by ``BatchRequests.table``."""
        if self.booked_rows is not None:
            self.booked_rows.drafts = {row: int(limits[row, 0]) for row in drafts}

    def _graph_size(self, num_reqs: int) -> int | None:
        """Batch size of the captured rounds that serve so many requests; None if there are none."""
        return None if self.graphs is None else self.graphs.size_for(num_reqs)

    def graph_mode(self) -> tuple[str, str]:
        """How draft rounds run on this machine, and why."""
        return graphs.choose_mode(
            on_cuda=self.device.type == "cuda" and torch.version.cuda is not None,
            full_graphs=self._full_graphs,
            metadata_in_place=self.supports_decode_metadata_update,
            has_if_nodes=hasattr(torch.cuda.CUDAGraph, "begin_capture_to_if_node"),
            num_ranks=self._num_ranks,
        )

    def how_rounds_run(self) -> tuple[str, str]:
        """The mode in force, and why; for the start-up log."""
        mode, reason = self.graph_mode()
        return (mode, reason) if mode == graphs.EAGER else self._mode

    def capture(self) -> None:
        """Capture draft rounds if they can be (called by vLLM after the target's graphs).

        Raises:
            RuntimeError: an error that the device does not get over.
        """
        self.drop_graphs("vLLM captured no graphs")
        mode, reason = self.graph_mode()
        before = torch.accelerator.get_memory_info()[0] if mode != graphs.EAGER else 0
        captured = None
        if mode != graphs.EAGER:
            backend = self._backend()
            with graph_capture(device=self.device):  # a stream of its own, and all-reduces that can be captured
                if mode == graphs.IF_NODES and (failure := self._attempt(backend, backend.probe)) is not None:
                    mode, reason = graphs.PER_PASS, f"IF nodes do not work here: {failure}"
                sizes = graphs.batch_sizes(min(self.max_num_reqs, self.max_num_tokens // SHORT))
                captured = graphs.DraftGraphs(self, mode, sizes, self.num_speculative_steps, backend)
                failure = self._attempt(backend, captured.capture)
            if not self._all_ranks(failure is None):
                mode, captured = graphs.EAGER, None
                reason = f"capture failed: {failure}" if failure is not None else "capture failed on another rank"
        if captured is not None:
            taken = before - torch.accelerator.get_memory_info()[0]
            self.graphs = captured
            reason += f"; {captured.num_graphs} graphs of up to {captured.sizes[-1]} requests, {taken / 2**20:.0f} MiB"
        self._mode = mode, reason

    def _backend(self) -> graphs.StartBackend:
        return graphs.CudaBackend(self.device, lambda pool: capture_pool(pool, self.vllm_config))

    @staticmethod
    def _attempt(backend: graphs.StartBackend, run: Callable[[], None]) -> str | None:
        """Why it failed, in one line, or None; the device is as if it had not been tried.

        Raises:
            RuntimeError: the device is lost: no graph is to blame, and nothing would run without graphs either.
        """
        try:
            run()
        except RuntimeError as error:  # the draft model runs as well without
            backend.recover()
            return " ".join(str(error).split())
        return None

    def _all_ranks(self, succeeded: bool) -> bool:
        """Whether all ranks did: eager and captured rounds run different numbers of passes, hence of collectives."""
        if self._num_ranks > 1:
            flag = torch.tensor(int(succeeded))
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN, group=get_tp_group().cpu_group)
            succeeded = bool(flag)
        return succeeded

    def prepare_round(self, size: int, length: int) -> None:
        """Set up a round of ``size`` requests that write no KV and draft ``length`` candidates each, or what a
        threshold rule leaves of them."""
        self.idx_mapping.fill_(-1)
        ones = torch.ones(size, dtype=torch.int32, device=self.device)
        self._loaded = None
        self.round.limits[:size] = length
        self.round.limits[:size, 1] = self.max_model_len
        self.round.limits[:size, 2:] = -1
        self.round.start(size, ones, ones * 0, ones)
        self.open()

    def prepare_capture(self, size: int) -> tuple[Callable[[], None], Callable[[int], None]]:
        """A round of ``size`` requests that write no KV, see ``graphs.Rounds``."""
        self.prepare_round(size, self.num_speculative_steps)
        first_state, later_state = (
            prepare_inputs_to_capture(
                size, size * query_len, self.model_state, self.input_buffers, self.block_tables, self.attn_groups,
                self.kv_cache_config, full_cudagraph=True, max_query_len=query_len,
            )
            for query_len in (SHORT, 1)
        )  # fmt: skip

        def first() -> None:
            self._step = 1
            self._load_short(size)
            self._map_slots(size, SHORT)
            self._run_pass(size, SHORT, *first_state)

        def later(step: int) -> None:
            self._step = step
            self._load_candidates(size)
            self._map_slots(size, 1)
            self._update_draft_decode_metadata(later_state[0], size)
            self._run_pass(size, 1, *later_state)

        return first, later

    def refresh_first_pass(self, size: int, seq_lens_cpu_upper_bound: torch.Tensor) -> None:
        """Let the attention backend's own buffers fit this batch before the first pass is replayed.

        Args:
            size: of the batch that is replayed.
            seq_lens_cpu_upper_bound: [num_reqs] int32 on the host, of what the target has read.
        """
        bound = torch.zeros(size, dtype=torch.int32)
        num_known = min(size, len(seq_lens_cpu_upper_bound))
        bound[:num_known] = seq_lens_cpu_upper_bound[:num_known]
        self._load_short(size)
        self._metadata(size, SHORT, bound, 1, CUDAGraphMode.FULL)

    def replay_alone(self, size: int, max_length: int) -> None:
        """Replay what :meth:`prepare_round` has set up, as a round in service is: for timing."""
        assert self.graphs is not None
        self.refresh_first_pass(size, torch.ones(size, dtype=torch.int32))
        self.graphs.replay(size, max_length)
