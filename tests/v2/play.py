# SPDX-License-Identifier: Apache-2.0
"""The random scheduler of the oracle harness: requests join, are read in chunks, are preempted, leave."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import torch

from tests.v2.oracle import BLOCK_SIZE, STOP_TOKEN, VOCAB, OracleModel, Request, Stops

JUNK = 0
"""What the runner reads where the scheduler booked room and nothing was drafted."""


class Play:
    """Drives a speculator for some steps, and compares every draft with what the rule says.

    Args:
        speculator: with an oracle attached; see ``oracle.attach``.
        vllm_config: that it was made with.
        stops: the rule in force.
        seed: of everything random.
        books: whether the scheduler books the upper bound for everybody, as asynchronous scheduling does.
        caches: whether requests that join may have their first blocks from one that left, KV in them and all.
    """

    def __init__(
        self, speculator: Any, vllm_config: Any, stops: Stops, seed: int, *, books: bool = False, caches: bool = False
    ) -> None:
        self.speculator, self.config, self.stops, self.books = speculator, vllm_config, stops, books
        self.caches, self.caps = caches, [None, None, None, None, 0, 2]
        self.joins = 0.4  # chance that a request joins, in each step with room for one
        self.accepts = 0.7  # chance that a candidate is accepted, if all before it are
        self.cached: list[tuple[list[int], list[int]]] = []  # tokens of whole blocks, and the blocks
        self.model: OracleModel = speculator.model
        self.random = np.random.default_rng(seed)
        self.free_states = list(range(speculator.max_num_reqs))
        self.free_blocks = list(range(1, len(self.model.tokens) // BLOCK_SIZE))
        self.random.shuffle(self.free_states)
        self.random.shuffle(self.free_blocks)
        self.requests: dict[str, Request] = {}
        self.last_sampled = torch.zeros(speculator.max_num_reqs, 1, dtype=torch.int64)
        self.num_joined = 0
        self.lengths: list[int] = []  # of all drafts compared
        self.num_left_out = self.num_caught_up = 0  # steps without a draft pass; passes that caught up
        self.caught_up = 0  # those of the last step

    def run(self, num_steps: int) -> list[int]:
        """Play; returns the lengths of the drafts that were compared."""
        for _ in range(num_steps):
            for name in [n for n, r in self.requests.items() if self._is_through(r)]:
                self.leave(name)
            while not self.requests or (self.free_states and self.random.random() < self.joins):
                self.join()
            if len(self.requests) > 2 and self.random.random() < 0.1:
                self.leave(str(self.random.choice(list(self.requests))))
            if self.random.random() < 0.1:
                self.preempt(str(self.random.choice(list(self.requests))))
            self.step([None, None, None, None, 0, 3][self.random.integers(6)])
        return self.lengths

    def _is_through(self, request: Request) -> bool:
        return len(request.tokens) >= min(request.end, self.speculator.max_model_len - 20)

    def join(self) -> None:
        """A prompt comes in, with limits of its own."""
        self.num_joined += 1
        request = Request(self.free_states.pop(), self._prompt())
        if self.cached and self.random.random() < 0.7:
            tokens, request.blocks = self.cached.pop()
            request.num_read = len(tokens)
            request.tokens = tokens + request.tokens[:60]
        request.prefill = len(request.tokens)
        request.cap = self.caps[self.random.integers(len(self.caps))]
        if self.random.random() < 0.5:
            request.end = len(request.tokens) + int(self.random.integers(2, 16))
        request.stops = frozenset({STOP_TOKEN}) if self.random.random() < 0.5 else frozenset()
        name = f"request {self.num_joined}"
        self.requests[name] = request
        self._add(name, request)

    def _prompt(self) -> list[int]:
        prompt: list[int] = self.random.integers(0, VOCAB, self.random.integers(1, 90)).tolist()
        return prompt

    def _emitted(self, tokens: list[int]) -> int:
        """The target's own token behind these."""
        return int(self.random.integers(0, VOCAB))

    def _add(self, name: str, request: Request) -> None:
        extra_args = None if request.cap is None else {"specdecpp": {"num_speculative_tokens": request.cap}}
        params = types.SimpleNamespace(
            extra_args=extra_args, max_tokens=request.end - request.prefill,
            eos_token_id=STOP_TOKEN if request.stops else None, stop_token_ids=[], seed=None,
        )  # fmt: skip
        self.speculator.requests.add(name, request.prefill, params)

    def leave(self, name: str) -> None:
        """A request ends; its state and its blocks go to others, KV in them and all."""
        request = self.requests.pop(name)
        self.free_states.insert(0, request.state)
        num_whole = request.num_read // BLOCK_SIZE
        if self.caches and 0 < num_whole <= 3 and len(self.cached) < 2:
            self.cached.append((request.tokens[: num_whole * BLOCK_SIZE], request.blocks[:num_whole]))
            request.blocks = request.blocks[num_whole:]
        self.free_blocks += request.blocks
        self.speculator.requests.update(types.SimpleNamespace(finished_req_ids=[name], scheduled_new_reqs=[]))

    def preempt(self, name: str) -> None:
        """A request loses its blocks, and what it has so far comes back as a prompt."""
        request = self.requests[name]
        self.free_blocks += request.blocks
        request.blocks, request.drafts, request.num_read, request.prefill = [], [], 0, len(request.tokens)
        self._add(name, request)

    def step(self, num_speculative_tokens: int | None = None) -> None:
        """One step of the engine: the target reads and verifies, the speculator drafts, all is compared."""
        names = list(self.requests)
        self.random.shuffle(names)
        batch, num_sampled, num_rejected = self._target(names)
        self.model.passes.clear()
        self.model.num_tokens.clear()
        handed = self._propose(batch, num_sampled, num_rejected, num_speculative_tokens)
        given = self.speculator.num_speculative_steps if num_speculative_tokens is None else num_speculative_tokens
        bound = min(given, self.speculator.config.num_speculative_tokens)
        wanted = [self._wanted(name, bound, int(n)) for name, n in zip(names, num_sampled, strict=True)]
        self._compare(names, handed, wanted)
        self._hand_over(names, handed, wanted, bound)

    def _target(self, names: list[str]) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """The target's pass: some drafts are accepted, then it emits a token of its own."""
        ids: list[int] = []
        positions: list[int] = []
        starts, seq_lens, sampled, rejected, prefilling = [0], [], [], [], []
        read_before = [min(self.requests[name].num_read, self.requests[name].prefill) for name in names]
        for name in names:
            request = self.requests[name]
            prefilling.append(request.num_read < request.prefill)
            query = (request.tokens[request.num_read :] + request.drafts)[: self.random.integers(20, 50)]
            chunk = request.num_read + len(query) < request.prefill  # the prompt is not read to its end
            ids += query
            positions += range(request.num_read, request.num_read + len(query))
            starts.append(len(ids))
            seq_lens.append(request.num_read + len(query))
            if chunk:
                request.num_read += len(query)
                sampled.append(0)
                rejected.append(0)
            else:
                accepted = self._accepted(request)
                sampled.append(accepted + 1)
                rejected.append(len(request.drafts) - accepted)
                request.tokens += request.drafts[:accepted]
                emitted = self._emitted(request.tokens)
                request.tokens.append(emitted)
                request.num_read = len(request.tokens) - 1
                self.last_sampled[request.state] = emitted
            held = self.speculator.runner.req_states.all_token_ids.gpu[request.state]
            held.fill_(STOP_TOKEN)
            held[: len(request.tokens)] = torch.tensor(request.tokens, dtype=torch.int32)[: len(held)]
            self._allocate(request)
        states = torch.tensor([self.requests[name].state for name in names])
        tables = self.speculator.block_tables
        tables.apply_staged_writes()
        tables.gather_block_tables(states, len(names))
        batch = types.SimpleNamespace(
            req_ids=names, num_reqs=len(names), num_tokens=len(ids), idx_mapping=states,
            input_ids=torch.tensor(ids, dtype=torch.int32), positions=torch.tensor(positions),
            query_start_loc=torch.tensor(starts, dtype=torch.int32), query_start_loc_np=np.array(starts, np.int32),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
            seq_lens_cpu_upper_bound=torch.tensor(seq_lens, dtype=torch.int32),
            is_prefilling_np=np.array(prefilling), num_computed_prefill_tokens_np=np.array(read_before),
            num_scheduled_tokens=np.diff(starts),
            prefill_len_np=np.array([self.requests[name].prefill for name in names]),
        )  # fmt: skip
        return batch, torch.tensor(sampled, dtype=torch.int32), torch.tensor(rejected, dtype=torch.int32)

    def _accepted(self, request: Request) -> int:
        """How many drafts the target accepts; what was booked beyond a draft never is."""
        accepted = 0
        submitted = min(int(self.speculator.submitted[request.state]), len(request.drafts))
        room = request.end - 1 - len(request.tokens)
        while accepted < min(submitted, room) and self.random.random() < self.accepts:
            accepted += 1
        return accepted

    def _allocate(self, request: Request) -> None:
        """Blocks for the tokens so far and a round's candidates, as the scheduler's look-ahead does."""
        longest = min(len(request.tokens) + self.speculator.num_speculative_steps, self.speculator.max_model_len)
        missing = max(-(-longest // BLOCK_SIZE) - len(request.blocks), 0)
        new = [self.free_blocks.pop() for _ in range(missing)]
        self.speculator.block_tables.append_block_ids(
            request.state, ([*request.blocks, *new],) if new else (request.blocks,), overwrite=True
        )
        request.blocks += new

    def _propose(self, batch: Any, num_sampled: Any, num_rejected: Any, num_speculative_tokens: Any) -> torch.Tensor:
        from vllm.config import set_current_vllm_config

        max_num_reqs = self.speculator.max_num_reqs
        with set_current_vllm_config(self.config):
            return self.speculator.propose(
                batch, {}, {}, None, None, num_sampled, num_rejected, self.last_sampled, None,
                torch.zeros(max_num_reqs), torch.zeros(max_num_reqs, dtype=torch.int64),
                num_speculative_tokens=num_speculative_tokens,
            )  # fmt: skip

    def _wanted(self, name: str, bound: int, num_sampled: int) -> list[int]:
        request = self.requests[name]
        room = min(request.end, self.speculator.max_model_len) - 1 - len(request.tokens)  # one token is the target's
        cap = min(bound, bound if request.cap is None else request.cap, room, self._planned(name))
        return self.stops.draft(request.tokens, cap, request.stops) if num_sampled and cap > 0 else []

    def _planned(self, name: str) -> int:
        """What the host allows the request in this round, beside its own limits."""
        return self.speculator.num_speculative_steps

    def _reads(self, names: list[str]) -> bool:
        """Whether the draft model has to read anything in this step."""
        return any(self.requests[name].cap != 0 for name in names)

    def _drawn(self, wanted: list[list[int]]) -> list[list[int]]:
        """The drafts among the candidates."""
        return wanted

    def _may_be_behind(self) -> bool:
        """Whether the draft model may have something to catch up with."""
        return self.num_left_out > 0

    def _compare(self, names: list[str], handed: torch.Tensor, wanted: list[list[int]]) -> None:
        got = self.speculator.draft_tokens[: len(names)].tolist()
        for row, (name, drafted) in enumerate(zip(names, wanted, strict=True)):
            padded = drafted + [-1] * (len(got[row]) - len(drafted))
            assert got[row] == padded, f"{name}: drafted {got[row]}, wanted {drafted}"
            assert handed[row].tolist() == [max(token, JUNK) for token in padded]
            assert int(self.speculator.submitted[self.requests[name].state]) == len(drafted)
        assert self.speculator.log.candidates(names) == wanted
        self.caught_up = 0
        wanted = self._drawn(wanted)
        if not self._reads(names):
            assert self.model.passes == [] and not any(wanted)
            self.num_left_out += 1
            return
        num_passes = max(1, *map(len, wanted), 1)
        self.caught_up = len(self.model.passes) - num_passes
        assert 0 <= self.caught_up <= self._may_be_behind() * 12
        self.num_caught_up += self.caught_up
        for index, wrote in enumerate(self.model.passes[self.caught_up + 1 :], 2):
            wants = [len(drafted) >= index for drafted in wanted]
            assert wrote == wants + [False] * (len(wrote) - len(wants)), f"pass {index} wrote KV for {wrote}"
        self.lengths += map(len, wanted)

    def _hand_over(self, names: list[str], handed: torch.Tensor, wanted: list[list[int]], bound: int) -> None:
        """What the next step's target reads: each draft, or room for ``bound`` tokens whatever was drafted."""
        for row, (name, drafted) in enumerate(zip(names, wanted, strict=True)):
            request = self.requests[name]
            room = self.speculator.max_model_len - 1 - len(request.tokens)
            booked = handed[row, : min(bound, room)].tolist() if self.books else drafted
            if self.random.random() < 0.1:
                booked = booked[: len(booked) // 2]  # the scheduler may submit fewer
            request.drafts = booked if request.num_read >= request.prefill else []
