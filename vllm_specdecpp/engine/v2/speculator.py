# SPDX-License-Identifier: Apache-2.0
"""The speculator for Model Runner V2: vLLM's standalone draft model, our draft loop.

Loading, KV groups, block tables and attention metadata stay vLLM's (``StandaloneARSpeculator``). A further pass is run
only while some request wants it; those that have stopped write no KV. Eager rounds ask the device once a pass whether
anybody goes on, captured ones (``engine.v2.graphs``) do not; under the cost-aware rule it decides, too.

How a length reaches the verification: with synchronous scheduling the Worker hands the scheduler lists of that length
(:meth:`SpecDecPPSpeculator.ragged`), so fewer rows are verified; with asynchronous scheduling the scheduler has booked
the upper bound already, and ``engine.v2.sampler`` ends each request's verification where its draft ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.utils import torch_utils
from vllm.v1.outputs import DraftTokenIds

from vllm_specdecpp.config import SpecDecPPConfig
from vllm_specdecpp.costs.file import CostFile
from vllm_specdecpp.costs.model import Points
from vllm_specdecpp.decision import tails
from vllm_specdecpp.decision.cost_aware.tail import CostAwareTail
from vllm_specdecpp.decision.rules import StopRule
from vllm_specdecpp.engine.gpu_defaults import memory_of
from vllm_specdecpp.engine.shared import vocabulary
from vllm_specdecpp.engine.shared.draft_limit import longest_drafted, warn_of_end
from vllm_specdecpp.engine.shared.round_log import Counts
from vllm_specdecpp.engine.v2 import timing
from vllm_specdecpp.engine.v2.capture import CapturedRounds
from vllm_specdecpp.engine.v2.cost_aware import DeviceCostAware, Plan
from vllm_specdecpp.engine.v2.free_runs import DeviceFreeRuns
from vllm_specdecpp.engine.v2.graphs import EAGER
from vllm_specdecpp.engine.v2.in_flight import DeferredRounds
from vllm_specdecpp.engine.v2.kv import DraftKVGaps
from vllm_specdecpp.engine.v2.passes import SHORT
from vllm_specdecpp.engine.v2.requests import BatchRequests
from vllm_specdecpp.kernels.cost_aware_tail import MAX_REQS, cost_aware_tail
from vllm_specdecpp.source_registry import ON_DEVICE

logger = init_logger("vllm.specdecpp")

_SEED_STEP = 0x9E3779B97F4A7C15
"""Odd and large: no round's seeds are another request's of another round."""


class SpecDecPPSpeculator(CapturedRounds):
    """Drafts with a candidate length per request.

    Args:
        vllm_config: its ``speculative_config`` is a plain ``draft_model`` one.
        device: where the draft model runs.
        config: our checked options.
        runner: the ``GPUModelRunner`` that owns this speculator; needed to time the target's passes.

    Attributes:
        submitted: [max_num_reqs] int32 by request state, candidates of the last round.
    """

    host_side = DeviceCostAware

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, config: SpecDecPPConfig, runner: Any = None
    ) -> None:
        super().__init__(vllm_config, device, config)
        self.runner = runner
        self.launch = cost_aware_tail if self.max_num_reqs <= MAX_REQS else tails.cost_aware_tail
        self.requests = BatchRequests(vllm_config.model_config.get_diff_sampling_param())
        self.log = DeferredRounds(config.trace_rounds)
        self.gaps = DraftKVGaps(self)
        self._longest = longest_drafted(vllm_config)
        self._num_proposals = 0
        self._warm_for: Any = None
        self._none = torch.zeros((), dtype=torch.int32, device=device)
        self.submitted = torch.zeros(self.max_num_reqs, dtype=torch.int32, device=device)
        vocabulary.fit_buffers(self)
        self.run_sources = [name for name in config.run_sources if name in ON_DEVICE]
        self.runs = DeviceFreeRuns(self, config.suffix_cache == "engine") if self.run_sources else None

    def set_attn(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's; nothing is known of a new KV cache's blocks."""
        super().set_attn(*args, **kwargs)
        self.gaps = DraftKVGaps(self)

    def start_cost_aware(self) -> None:
        """See :meth:`Drafter.start_cost_aware`."""
        self.warm()  # where the rule was chosen in service
        super().start_cost_aware()
        if self.cost_aware is not None:
            self.cost_aware.in_flight = self.log.in_flight
            if self.runs is not None and not self.gaps.can_catch_up:
                logger.warning("specdecpp: free runs are off, as the draft model must read every token at once: it has "
                               "a sliding window, or there is context parallelism or a KV connector")  # fmt: skip

    def warm(self) -> None:
        """Compile our kernels, and vLLM's that its own warm-up does not reach: nothing is compiled in service."""
        if self._warm_for is self.round.rule:
            return
        self._warm_for = self.round.rule
        self.round.warm()
        self.warm_prefill()
        if self.runs is not None and self._tail is not None:
            self.runs.warm(self._tail)
        if self.booked_rows is not None and self.device.type == "cuda":
            self.booked_rows.warm()

    def put_in_force(self, rule: StopRule | CostAwareTail, min_length: int) -> None:
        """See :meth:`Drafter.put_in_force`; captured rounds hold the rule that they were captured with.

        Raises:
            ValueError: no kernel decides as the rule does; the one before stays in force.
        """
        before = self.round.rule.name, self.round.min_length
        self.round.set_rule(rule, min_length)
        if self.graphs is not None and before != (rule.name, min_length):
            logger.warning("specdecpp: draft rounds run without CUDA graphs from now on: they hold the old rule")
            self.graphs, self._mode = None, (EAGER, "the rule was changed")

    def cost_file(self, **more: str) -> CostFile:
        """Times of this runner are not those of Model Runner V1: other kernels, other graphs, other scheduling."""
        mode, is_async = self.how_rounds_run()[0], self.scheduler_config.async_scheduling
        lora = self.vllm_config.lora_config
        ours = {"model_runner": f"V2/{mode}", "async_scheduling": str(is_async)}
        if lora is not None:
            ours["lora"] = f"{lora.max_loras} of rank {lora.max_lora_rank}"
        return super().cost_file(**ours, **more)

    def measure_costs(self) -> Points:
        """See :meth:`Drafter.measure_costs`."""
        return timing.measure(self)

    @torch.inference_mode()
    def propose(
        self,
        input_batch: Any,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, torch.Tensor],
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,  # [num_reqs]
        num_rejected: torch.Tensor,  # [num_reqs]
        last_sampled: torch.Tensor,  # [max_num_reqs, 1]
        next_prefill_tokens: torch.Tensor,
        temperature: torch.Tensor,  # [max_num_reqs]
        seeds: torch.Tensor,  # [max_num_reqs]
        dp_sync_state: Any = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: Any = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> torch.Tensor:
        """Draft one round (``BaseSpeculator.propose``, same arguments).

        Returns:
            [num_reqs, num_speculative_steps] int64: each request's candidates, then 0; ``submitted`` has their number.
        """
        num_reqs, request_ids = input_batch.num_reqs, input_batch.req_ids
        if (costs := self._costs_in_force(dummy_run)) is not None:
            costs.verified(request_ids, input_batch.is_prefilling_np.tolist(), num_sampled, num_rejected)
        given = self.num_speculative_steps if num_speculative_tokens is None else num_speculative_tokens
        bound = min(given, 2 if dummy_run else self.config.num_speculative_tokens)
        limits = self.requests.table(request_ids, bound, self._longest)
        beyond = np.zeros(num_reqs, dtype=bool) if dummy_run else self._beyond(input_batch)
        if beyond.any():
            limits = np.where(beyond[:, None] & (np.arange(limits.shape[1]) == 0), 0, limits)
            self.log.beyond_draft(name for name, is_beyond in zip(request_ids, beyond, strict=True) if is_beyond)
        if limits is not self._loaded:
            torch_utils.async_tensor_h2d(limits, out=self.round.limits[:num_reqs])
            self._loaded = limits
        self._copy_request_inputs(num_reqs, input_batch.idx_mapping, temperature, seeds, dummy_run=dummy_run)
        if self.draft_logits is not None and (seeded := self.requests.seeded(request_ids)):
            self.temperature.index_fill_(0, input_batch.idx_mapping[self.on_device(seeded)].long(), 0.0)
        if isinstance(self.round.rule, CostAwareTail):
            # vLLM's noise goes by seed and position: a token drawn anew would be the one that the rule has learnt from.
            self._num_proposals += 1
            self.seeds.add_(self._num_proposals * _SEED_STEP % 2**63)
        self.round.start(num_reqs, input_batch.seq_lens, num_rejected, num_sampled)
        if is_profile and self.device.type == "cuda":
            memory_of(self.vllm_config).hold(self.device)
        if dummy_run:
            self._dummy_round(input_batch, num_rejected, last_sampled, skip_attn_for_dummy_run)
            return self.draft_tokens[:num_reqs].clamp(min=0)
        self.gaps.arrive(input_batch, self.requests.take_arrived())
        if self.runs is not None:
            self.runs.verified(input_batch, num_sampled)
        passes = 0, self._none
        if self.requests.all_off(name for name, is_beyond in zip(request_ids, beyond, strict=True) if not is_beyond):
            self.gaps.leave_out(input_batch)
            self._book(limits, ())
        else:
            passes = self._round(costs, input_batch, limits, num_rejected, last_sampled)
        self.submitted[input_batch.idx_mapping] = self.round.lengths[:num_reqs]
        self._note(input_batch, num_sampled, num_rejected, last_sampled, *passes, limits)
        # -1 is no row of an embedding table: see engine.v2.sampler.
        return self.draft_tokens[:num_reqs].clamp(min=0)

    def _beyond(self, input_batch: Any) -> np.ndarray:
        """[num_reqs] bool: the requests that the host knows to be beyond the draft's last position for good."""
        num_reqs, most_in_flight = input_batch.num_reqs, 3 * (1 + self.num_speculative_steps)
        least = input_batch.seq_lens_cpu_upper_bound[:num_reqs].numpy() - most_in_flight
        beyond: np.ndarray = np.maximum(least, input_batch.prefill_len_np[:num_reqs]) >= self.draft_limit
        if beyond.any():
            warn_of_end(self.draft_limit)
        return beyond

    def _costs_in_force(self, dummy_run: bool) -> DeviceCostAware | None:
        """The host side of the rule that this step begins a round of; None while there is no such rule, or no costs."""
        return None if dummy_run or self.round.rule is not self._tail else self.cost_aware

    def _round(
        self,
        costs: DeviceCostAware | None,
        input_batch: Any,
        limits: np.ndarray,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
    ) -> tuple[int, torch.Tensor]:
        """Draft for the batch, or leave it; returns the draft model's passes, and those that only the device knows."""
        num_reqs = input_batch.num_reqs
        # A request that gives blocks back would never be read what it is behind.
        runs = self.runs if costs is not None and self.gaps.can_catch_up else None
        if costs is not None:
            costs.runs = runs
        plan = self._plan(costs, input_batch, limits)
        self._book(limits, plan.drafts)
        runs = runs if plan.takes_runs else None
        if runs is not None and self._tail is not None:
            runs.find(input_batch, self._tail)
        num_passes, uncounted = 0, self._none
        read: list[int] = []  # tokens of each pass, if more were read than in a usual round
        if plan.reads or not self.gaps.can_catch_up:
            is_short = self._can_read_short(input_batch)
            if self.runs is not None and is_short and (ran := self.runs.took_runs()):
                self.gaps.have_gaps(input_batch, ran, self.runs.has_gap(input_batch))
            read = self._catch_up(input_batch, plan.drafts)
            drafted = self._draft(input_batch, num_rejected, last_sampled, plan.longest)
            num_passes = len(read) + (1 if drafted is None else drafted)
            if drafted is None:
                uncounted = self.round.num_later_passes
            if not is_short:
                read.append(input_batch.num_tokens + num_reqs)  # and each one's next token
            elif read:
                read.append(SHORT * num_reqs)
            self.gaps.read(input_batch)
        else:
            self.gaps.leave_out(input_batch)
        if runs is not None and plan.drafts and self._tail is not None:
            runs.follow(self._tail)
        if costs is not None:
            costs.drafted(read, num_reqs, self.round.lengths)
        if runs is not None:
            runs.submit()
        return num_passes, uncounted

    def _plan(self, costs: DeviceCostAware | None, input_batch: Any, limits: np.ndarray) -> Plan:
        """Who drafts, on every rank: under the cost-aware rule as rank 0 decides, else whoever may."""
        if costs is None:
            self.open()
            may_draft = limits[:, 0] > 0
            return Plan(int(limits[:, 0].max()), tuple(np.flatnonzero(may_draft).tolist()), reads=True)
        names = input_batch.req_ids
        prompts = np.where(input_batch.is_prefilling_np, input_batch.num_scheduled_tokens, 0)
        # The first token's position, too, while a prompt is read in chunks.
        prompt_lens = input_batch.prefill_len_np
        next_positions = np.maximum(input_batch.seq_lens_cpu_upper_bound[: len(names)].numpy(), prompt_lens)
        plan = costs.begin_round(
            names,
            self._known_room(input_batch, limits),
            self.gaps.missing(names),
            prompts.tolist(),
            np.maximum(limits[:, 1] - 1 - next_positions, 0).tolist(),
            (next_positions + 1 - prompt_lens).tolist(),
            [name in self.requests.constrained for name in names],
        )
        self.round.admit()
        return self._tell(plan)

    def _tell(self, plan: Plan | None) -> Plan:
        """Rank 0's plan on every rank, between the hosts: the device is not waited for."""
        told: Plan | None = plan if self._num_ranks == 1 else get_tp_group().broadcast_object(plan, src=0)
        assert told is not None
        return told

    def _catch_up(self, input_batch: Any, rows: Sequence[int]) -> list[int]:
        """Read what these requests' draft KV lacks before the first pass; returns the tokens of each pass."""
        if self._can_read_short(input_batch):
            ends = self.round.next_positions[: input_batch.num_reqs] - 1
        else:  # vLLM's first pass reads this step's tokens anew
            ends = input_batch.positions[input_batch.query_start_loc[: input_batch.num_reqs].long()]
        return self.gaps.catch_up(input_batch, rows, ends)

    def _known_room(self, input_batch: Any, limits: np.ndarray) -> list[int]:
        """Upper bounds on the candidate lengths: exact ones where the device is the host, else what the host knows.

        For the rule's plan only: what is drafted is bounded on the device.
        """
        if self.device.type == "cpu":
            return self.round.max_lengths[: input_batch.num_reqs].tolist()
        read = input_batch.num_computed_prefill_tokens_np + input_batch.num_scheduled_tokens
        in_prompt = input_batch.is_prefilling_np & (read < input_batch.prefill_len_np)
        room: list[int] = np.where(in_prompt, 0, limits[:, 0]).tolist()
        return room

    def _dummy_round(
        self, input_batch: Any, num_rejected: torch.Tensor, last_sampled: torch.Tensor, skip_attn: bool
    ) -> None:
        """What vLLM asks for to measure memory, to compile, and to learn what a round costs: no KV is written."""
        if not skip_attn and (size := self._graph_size(input_batch.num_reqs)) is not None:
            self.prepare_round(size, self.num_speculative_steps)
            self.replay_alone(size, self.num_speculative_steps)
            return
        self.open()
        self._step = 1
        self._prefill(input_batch, num_rejected, last_sampled, input_batch.num_reqs, skip_attn, None)
        # Every kernel once, not K_max equal passes.
        self._later_passes(input_batch, min(2, self.num_speculative_steps), skip_attn)

    def _draft(
        self, input_batch: Any, num_rejected: torch.Tensor, last_sampled: torch.Tensor, max_length: int
    ) -> int | None:
        """The draft loop; returns how many passes of the draft model it ran, None if only the device knows.

        The first pass runs even if nothing may be drafted: it keeps the draft model's KV up to date.
        """
        self._step = 1
        size = self._graph_size(input_batch.num_reqs)
        is_short = self._can_read_short(input_batch)
        if not is_short:
            self._prefill(input_batch, num_rejected, last_sampled, input_batch.num_reqs, False, None)
        else:
            self._stage_short(input_batch, num_rejected, last_sampled)
            if size is not None:
                self.refresh_first_pass(size, input_batch.seq_lens_cpu_upper_bound)
            else:
                self._load_short(input_batch.num_reqs)
                self._eager_pass(input_batch, SHORT)
        if self.graphs is not None and size is not None:
            return self.graphs.replay(size, max_length, first=is_short)
        return self._later_passes(input_batch, max_length)

    def _later_passes(self, input_batch: Any, max_length: int, skip_attn: bool = False) -> int:
        """Passes 2, 3, ... without graphs; returns how many passes were run, the first one among them."""
        for step in range(2, max_length + 1):
            if not self.round.any_running:  # waits for the device
                return step - 1
            self._step = step
            self._load_candidates(input_batch.num_reqs)
            self._eager_pass(input_batch, 1, skip_attn)
        return max(1, max_length)

    def _note(
        self,
        input_batch: Any,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        num_passes: int,
        uncounted: torch.Tensor,
        limits: np.ndarray,
    ) -> None:
        """Put the step down for the log; the numbers follow when the device has them."""
        num_reqs = input_batch.num_reqs
        last = last_sampled.view(-1)[input_batch.idx_mapping]  # [num_reqs]
        ran = self.runs.lengths(input_batch) if self.runs is not None else self._none.expand(num_reqs)
        whole = num_sampled[:num_reqs], num_rejected[:num_reqs], self.round.max_lengths[:num_reqs], ran
        columns = torch.stack((*whole, uncounted.expand(num_reqs)), dim=1).long()  # [num_reqs, 5], of int32
        self.log.note(
            input_batch.req_ids,
            input_batch.is_prefilling_np.tolist(),
            self.requests.take_finished(),
            torch.cat((columns, last[:, None], self.draft_tokens[:num_reqs]), dim=1),
            num_passes,
            limits[:, 2:],
        )

    def counts(self) -> Counts:
        """See :meth:`Drafter.counts`; the device is not waited for."""
        if self.log.is_settled():
            self.log.finished(self.requests.take_finished())
        return super().counts()

    def ragged(self, draft_tokens: DraftTokenIds) -> DraftTokenIds:
        """What the scheduler is told with synchronous scheduling: each request's own candidates, and no more.

        Waits for the drafting to end, once a round; the host has nothing else to do then.
        """
        candidates = self.log.candidates(draft_tokens.req_ids)
        rows = zip(candidates, draft_tokens.draft_token_ids, strict=True)
        return DraftTokenIds(draft_tokens.req_ids, [mine[: len(booked)] for mine, booked in rows])
