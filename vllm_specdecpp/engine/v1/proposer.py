# SPDX-License-Identifier: Apache-2.0
"""The proposer for Model Runner V1: vLLM's draft model, our draft loop.

Loading, compilation, KV groups and attention metadata stay vLLM's (``DraftModelProposer``); :meth:`propose` is our
own: it drafts until every sequence has stopped, drops stopped sequences from the draft's batch, and returns candidates
of different lengths, which vLLM's scheduler and rejection sampler take as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.draft_model import DraftModelProposer

from vllm_specdecpp.config import SpecDecPPConfig
from vllm_specdecpp.costs import timing
from vllm_specdecpp.costs.model import Points
from vllm_specdecpp.decision.cost_aware.admission import Standing
from vllm_specdecpp.decision.cost_aware.tail import CostAwareTail
from vllm_specdecpp.decision.features import features_from_logits
from vllm_specdecpp.decision.round import DraftRound
from vllm_specdecpp.decision.rules import StopRule
from vllm_specdecpp.decision.sources import Tokens
from vllm_specdecpp.engine.recording.recorder import DraftTrace, RoundRecorder
from vllm_specdecpp.engine.shared.draft_limit import draft_limit, longest_drafted, warn_of_end
from vllm_specdecpp.engine.shared.kept_blocks import keeps_all_blocks
from vllm_specdecpp.engine.shared.round_log import RoundLog, why_stopped
from vllm_specdecpp.engine.v1 import draft_layers
from vllm_specdecpp.engine.v1.inputs import DraftInputs, DraftKV, RowBlocks, RowState, decode_pass, first_pass
from vllm_specdecpp.engine.v1.passes import DraftPasses
from vllm_specdecpp.engine.v1.requests import RunnerRequests
from vllm_specdecpp.engine.v1.rows import draft_greedily, ragged, scatter, select_rows
from vllm_specdecpp.engine.v1.timing import SinglePasses

logger = init_logger("vllm.specdecpp")


class SpecDecPPProposer(DraftPasses):
    """Drafts with a candidate length per sequence (``vllm.v1.spec_decode.draft_model.DraftModelProposer``).

    Args:
        vllm_config: its ``speculative_config`` is a plain ``draft_model`` one.
        device: where the draft model runs.
        runner: the ``GPUModelRunner`` that owns this proposer.
        config: our checked options.
    """

    num_speculative_tokens: int
    validate_same_kv_cache_group = draft_layers.worded(DraftModelProposer.validate_same_kv_cache_group)

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any, config: SpecDecPPConfig) -> None:
        super().__init__(vllm_config, device, config, runner)
        self.runner = runner
        self.rule: StopRule | CostAwareTail
        self.run_sources = config.run_sources
        self.log = RoundLog(config.trace_rounds)
        self.recorder: RoundRecorder | None = None  # of rank 0, while recording
        self.draft_kv = DraftKV()
        self.draft_limit = draft_limit(vllm_config)
        defaults = vllm_config.model_config.get_diff_sampling_param()
        self.requests = RunnerRequests(runner, longest_drafted(vllm_config), defaults)
        self._last_draft_probs: torch.Tensor | None = None  # read by vLLM through take_last_draft_probs
        # Request id -> next position, what was submitted, why not more, how much of it the draft model drew.
        self._candidates: dict[str, tuple[int, list[int], str, int]] = {}

    def put_in_force(self, rule: StopRule | CostAwareTail, min_length: int) -> None:
        """See :meth:`Drafter.put_in_force`; each round takes the least length from the options."""
        self.rule = rule

    def measure_costs(self) -> Points:
        """See :meth:`Drafter.measure_costs`."""
        scheduler, bound = self.vllm_config.scheduler_config, self.speculative_config.num_speculative_tokens
        return timing.measure(SinglePasses(self), scheduler, bound, self.agree, self.seconds_so_far())

    @torch.inference_mode()
    def propose(
        self,
        num_speculative_tokens: int,
        target_token_ids: torch.Tensor,  # [num_tokens]
        target_positions: torch.Tensor,  # [num_tokens]
        target_hidden_states: torch.Tensor,  # [num_tokens, target_hidden_size]
        next_token_ids: torch.Tensor,  # [num_reqs]
        token_indices_to_sample: torch.Tensor | None,
        common_attn_metadata: CommonAttentionMetadata,
        sampling_metadata: SamplingMetadata,
        mm_embed_inputs: Any = None,
        num_rejected_tokens_gpu: torch.Tensor | None = None,  # [num_reqs]
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Draft one round (``SpecDecodeBaseProposer.propose``, same arguments).

        Returns:
            Each request's candidates; an empty list where none are wanted.
        """
        self.num_speculative_tokens = num_speculative_tokens
        self._last_draft_probs = None
        query_starts = common_attn_metadata.query_start_loc_cpu.tolist()  # [num_reqs + 1]
        num_reqs = common_attn_metadata.batch_size()
        with self.log.step() as step:
            rejected = [0] * num_reqs if num_rejected_tokens_gpu is None else num_rejected_tokens_gpu.tolist()
            rows = self.requests.rows(query_starts, rejected)
            if beyond := [row.request_id for row in rows if row.next_position >= self.draft_limit]:
                warn_of_end(self.draft_limit)
                self.log.beyond_draft(beyond)
            outcomes = self._log_verified(rows, query_starts, rejected, next_token_ids)
            block_table = common_attn_metadata.block_table_tensor
            blocks = [RowBlocks(block_table[i], self.block_size) for i in range(num_reqs)]
            bound = min(num_speculative_tokens, self.config.num_speculative_tokens)
            self.draft_kv.begin(rows, blocks)
            missing = [self.draft_kv.first_missing(row, own) for row, own in zip(rows, blocks, strict=True)]

            @cache
            def on_host() -> tuple[Tokens, Tokens]:
                return target_token_ids.cpu().numpy(), next_token_ids.cpu().numpy()

            def tokens(index: int) -> Tokens:
                """The request's tokens so far, the next one included."""
                row, start = rows[index], query_starts[index]
                read, emitted = on_host()
                now = read[start : start + row.next_position - row.first_query_position]
                older = self.requests.older_tokens(index, row.first_query_position)
                return np.concatenate([older, now, emitted[index : index + 1]])

            given = None if self.recorder is not None else tokens  # a record is of the draft model's candidates
            since = step["since_last_seconds"]
            state, fed, free = self._begin_round(rows, outcomes, bound, since, missing, given)
            num_fed: list[int | None] = [None] * num_reqs
            candidates = free
            if fed:
                index = torch.tensor(fed)
                passes = first_pass(
                    [rows[i] for i in fed],
                    [missing[i] for i in fed],
                    target_token_ids,
                    [query_starts[i] for i in fed],
                    next_token_ids[index.to(self.device)],
                    block_table[index.to(self.device)],
                    self.block_size,
                    self.max_model_len,
                    lambda row, start, end: self.requests.token_ids(fed[row], start, end),
                    self.max_num_tokens,
                )
                read = [len(p.token_ids) for p in passes]
                step["read"] = read if sum(read) > 2 * len(fed) else []
                trace = None if self.recorder is None else DraftTrace()
                seeded = sampling_metadata.generators  # see engine.v1.own_noise
                sampling = draft_greedily(sampling_metadata, seeded)
                outruns = bool(self.run_sources) and isinstance(self.rule, CostAwareTail)  # on all ranks alike
                drafted, num_fed = self._draft(index, passes, state, block_table, sampling, trace, outruns)
                if self.recorder is not None and trace is not None:
                    self.recorder.drafted(rows, drafted, trace)
                if outruns:
                    free = self.cost_aware.follow(drafted)
                candidates = [mine + run for mine, run in zip(drafted, free, strict=True)]
                self._mix_in([[] if row in seeded else mine for row, mine in enumerate(drafted)], candidates)
            submitted = list(zip(candidates, self._why_stopped(state, candidates, free), map(len, free), strict=True))
            self._finish_round(rows, num_fed, submitted, blocks)
        if not all(map(self.requests.is_prefilling, range(num_reqs))):
            self.log.left_out(bound - step["passes"])
        if self.cost_aware is not None:
            self.cost_aware.timed(step)
        return candidates

    def _begin_round(
        self,
        rows: list[RowState],
        outcomes: dict[int, tuple[int, int]],
        bound: int,
        since_last: float | None,
        first_missing: list[int],
        tokens: Callable[[int], Tokens] | None,
    ) -> tuple[DraftRound, list[int], list[list[int]]]:
        """Decide who drafts, whom the first pass is for: them, and prompts that are being read; and who takes a run."""
        free: list[list[int]] = [[] for _ in rows]
        max_lengths = [self.requests.max_length(row, index, bound) for index, row in enumerate(rows)]
        prompts = [self.requests.is_prefilling(index) for index in range(len(rows))]
        stop_token_ids = self.requests.stop_token_ids(rows)
        if not isinstance(self.rule, CostAwareTail):
            state = DraftRound(
                self.rule,
                torch.tensor(max_lengths, device=self.device),
                min_length=self.config.min_speculative_tokens,
                stop_token_ids=stop_token_ids,
                agree=self.agree,
            )
            drafts = [length > 0 for length in max_lengths]
            keep_up = any(drafts) or not any(max_lengths)
        else:
            batch = [
                Standing(
                    row.request_id,
                    limit,
                    room=self.requests.remaining(row),
                    behind=max(row.next_position - 1 - missing, 0),
                    emitted=self.requests.emitted(row),
                    constrained=self.requests.is_constrained(row),
                )
                for row, limit, missing in zip(rows, max_lengths, first_missing, strict=True)
            ]
            by_request = {rows[index].request_id: outcome for index, outcome in outcomes.items()}
            state = self.cost_aware.begin(batch, by_request, stop_token_ids, since_last, tokens)
            if self.run_sources:
                free = self.cost_aware.free_runs(len(rows))
            drafts = state.running.tolist()
            keep_up = False  # a prompt is read when its request is first drafted for
        fed = [
            index
            for index, row in enumerate(rows)
            if drafts[index]
            or ((keep_up and prompts[index] or not self.can_catch_up) and self.requests.will_go_on(row, index))
        ]
        return state, fed, free

    def _mix_in(self, drawn: list[list[int]], candidates: list[list[int]]) -> None:
        """Draft probabilities of candidates that nobody drew, behind those in ``drawn``: all on their tokens."""
        probs, longest = self._last_draft_probs, max(map(len, candidates))
        if probs is None or not longest:
            return  # vLLM takes all candidates for certain
        if longest > probs.shape[1]:
            probs = torch.nn.functional.pad(probs, (0, 0, 0, longest - probs.shape[1]))
        certain = [
            (row, step, token)
            for row, (mine, tokens) in enumerate(zip(drawn, candidates, strict=True))
            for step, token in enumerate(tokens[len(mine) :], len(mine))
        ]
        if certain:
            rows, steps, tokens = torch.tensor(certain, device=probs.device).T
            probs[rows, steps] = 0.0
            probs[rows, steps, tokens] = 1.0
        self._last_draft_probs = probs

    @cached_property
    def can_catch_up(self) -> bool:
        """Whether the draft model may leave a request's tokens for later; else it reads them in every round."""
        return keeps_all_blocks(self.vllm_config, self.runner.kv_cache_config, self._draft_attn_layer_names)

    def _draft(
        self,
        fed: torch.Tensor,
        passes: list[DraftInputs],
        state: DraftRound,
        block_table: torch.Tensor,
        sampling_metadata: SamplingMetadata,
        trace: DraftTrace | None,
        outruns: bool,
    ) -> tuple[list[list[int]], list[int | None]]:
        """The draft loop: passes and draws until every request has stopped.

        Args:
            fed: [num_fed] int64, requests that the first pass is for.
            passes: the first pass, and those that had to be split off it; of ``fed``.
            outruns: whether a draft ends where a free run goes on more cheaply.

        Returns:
            Each request's candidates, and how many tokens from its next token on the draft model has read; None for
            those not in ``fed``.
        """
        num_reqs = state.running.shape[0]
        for inputs in passes:
            hidden_states = self._run_draft_model(inputs, block_table[fed[inputs.rows].to(self.device)], 0)
        hidden_states = hidden_states[inputs.last_indices.to(self.device)]  # [num_fed, hidden_size]
        fed_rows = fed.to(self.device)
        next_positions = torch.zeros(num_reqs, dtype=torch.int64, device=self.device)  # of the candidate to be drawn
        next_positions[fed_rows] = inputs.seq_lens.to(self.device).long()
        num_fed: list[int | None] = [None] * num_reqs
        for index in fed.tolist():
            num_fed[index] = 1
        drawn: list[torch.Tensor] = []  # per step: [num_reqs] candidates, -1 where none was submitted
        probabilities: list[torch.Tensor] = []  # per step: [num_reqs, vocab_size]
        needs = state.needs if trace is None else state.needs | trace.needs

        while state.goes_on():
            running = state.running.nonzero().squeeze(1)  # [num_running]
            hidden_states = hidden_states[torch.isin(fed_rows, running)]  # [num_running, hidden_size]
            logits = self.compute_logits(hidden_states)  # [num_running, vocab_size]
            features = features_from_logits(logits, hidden_states, needs=needs)
            state.observe(features, running)
            metadata = select_rows(sampling_metadata, running) if len(running) < num_reqs else sampling_metadata
            token_ids, probs = self._sample_from_logits(logits, metadata)  # [num_running], [num_running, vocab_size]
            token_ids = self.agree(token_ids)
            column = state.append(token_ids, running)  # [num_reqs]
            submits = column[running] >= 0  # [num_running]
            if trace is not None:
                trace.step(running[submits], features.select(submits))
            drawn.append(column)
            if probs is not None:
                probabilities.append(scatter(probs, running, num_reqs, fill=0))
            if outruns and state.goes_on():
                self.cost_aware.end_outrun(ragged(drawn, state.lengths))
            if not state.goes_on():
                break
            keep = state.running[running] > 0  # [num_running]
            fed_rows = running[keep]
            fed_blocks = block_table[fed_rows]
            positions = next_positions[fed_rows] + len(drawn) - 1
            inputs = decode_pass(token_ids[keep], positions, fed_blocks, self.block_size, self.max_model_len)
            hidden_states = self._run_draft_model(inputs, fed_blocks, len(drawn))
            for index in fed_rows.tolist():
                num_fed[index] = (num_fed[index] or 0) + 1

        if probabilities:
            self._last_draft_probs = torch.stack(probabilities, dim=1).contiguous()  # [num_reqs, num_steps, vocab_size]
        return ragged(drawn, state.lengths), num_fed

    def _log_verified(
        self, rows: list[RowState], query_starts: list[int], rejected: list[int], next_token_ids: torch.Tensor
    ) -> dict[int, tuple[int, int]]:
        """Account for the rounds that were just verified: row -> candidates verified, accepted.

        A round may be verified some steps late, where the scheduler had no room for the request in between; it is
        counted, but is no outcome of the last round.
        """
        next_tokens = next_token_ids.tolist()
        outcomes: dict[int, tuple[int, int]] = {}
        for index, row in enumerate(rows):
            position, candidates, stop, num_drafted = self._candidates.get(row.request_id, (-1, [], "", 0))
            if position != row.first_query_position:
                continue
            num_verified = query_starts[index + 1] - query_starts[index] - 1  # the scheduler may submit fewer
            num_accepted = num_verified - rejected[index]
            if self.draft_kv.continues(row):
                outcomes[index] = num_verified, num_accepted
            mine = candidates[:num_verified]
            self.log.verified(row.request_id, mine, num_accepted, next_tokens[index], stop, num_drafted)
        if self.recorder is not None:
            self.recorder.verified(rows, outcomes)
        return outcomes

    def _why_stopped(
        self, state: DraftRound, candidates: list[list[int]], free: list[list[int]]
    ) -> list[str]:  # fmt: skip
        """Of each request, for the log."""
        limits, stops = state.max_lengths.tolist(), state.stop_token_ids.tolist()
        sources = [self.cost_aware.source_of(row) if run else "" for row, run in enumerate(free)]
        return [
            why_stopped(len(tokens), limit, bool(tokens) and tokens[-1] in ends, source)
            for tokens, limit, ends, source in zip(candidates, limits, stops, sources, strict=True)
        ]

    def _finish_round(
        self,
        rows: list[RowState],
        num_fed: list[int | None],
        submitted: list[tuple[list[int], str, int]],
        blocks: list[RowBlocks],
    ) -> None:
        """``submitted``: [num_reqs] candidates, why not more, and how many of them are a free run's."""
        prefilling = [self.requests.is_prefilling(index) for index in range(len(rows))]
        # After an unfinished prefill vLLM's "next token" is a stand-in (the prompt's last token): its KV is wrong.
        num_right = [0 if p and fed is not None else fed for p, fed in zip(prefilling, num_fed, strict=True)]
        self.draft_kv.replace(rows, num_right, blocks)
        held = {name: drafted for name, drafted in self._candidates.items() if name in self.runner.requests}
        self._candidates = held | {
            row.request_id: (-1 if p else row.next_position, tokens, stop, len(tokens) - num_free)
            for row, (tokens, stop, num_free), p in zip(rows, submitted, prefilling, strict=True)
        }
