# SPDX-License-Identifier: Apache-2.0
"""Records what was drafted and what became of it: the training data of acceptance heads, from the engine's own rounds.

The proposer hands over a round's draft passes (:class:`DraftTrace`); at its next call it knows the outcome, and the
round is complete. Nothing here draws random numbers or changes what the engine does. Pure torch, no vLLM import.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_specdecpp.data.shards import RoundRecord, empty_shard, open_dataset, shard_from_rounds, write_shard
from vllm_specdecpp.decision.features import StepFeatures
from vllm_specdecpp.engine.recording.folder import RecordFolder
from vllm_specdecpp.engine.v1.inputs import RowState

logger = logging.getLogger("vllm.specdecpp")

FEATURES = frozenset({"hidden_states", "top1_prob", "entropy", "margin", "drawn_logprob"})
"""Fields of :class:`StepFeatures` that are recorded."""
STEPS_PER_SHARD = 4096
"""Of a shard that the engine writes by itself."""
MAX_WAITING = 8
"""Shards that may wait for the disk."""
GREEDY_BELOW = 1e-5
"""Temperatures that vLLM treats as 0 (``vllm.sampling_params._SAMPLING_EPS``)."""


class DraftTrace:
    """The draft passes of one round of a batch, kept on the device until the round's end."""

    needs = FEATURES

    def __init__(self) -> None:
        self._rows: list[torch.Tensor] = []
        self._hidden_states: list[torch.Tensor] = []
        self._scalars: list[torch.Tensor] = []

    def step(self, rows: torch.Tensor, features: StepFeatures, drawn_logprob: torch.Tensor | None) -> None:
        """One pass and the candidates drawn from it.

        Args:
            rows: [num_rows] int64, the requests that drew a candidate.
            features: of ``rows``.
            drawn_logprob: [num_rows] log q at temperature 1 of the candidate that was drawn.
        """
        assert features.hidden_states is not None
        columns = (features.top1_prob, features.entropy, features.margin, drawn_logprob)
        self._rows.append(rows)
        self._hidden_states.append(features.hidden_states)
        self._scalars.append(torch.stack([c.float() for c in columns if c is not None]))  # [4, num_rows]

    def by_request(self, num_reqs: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each request's hidden states [num_steps, hidden_size] and scalars [4, num_steps], on the CPU."""
        if not self._rows:
            return [(torch.empty(0), torch.empty(4, 0))] * num_reqs
        rows = torch.cat(self._rows).cpu()  # [num_drawn], step after step
        hidden_states = torch.cat(self._hidden_states).cpu()
        scalars = torch.cat(self._scalars, dim=1).cpu()
        index = [(rows == request).nonzero().squeeze(1) for request in range(num_reqs)]
        return [(hidden_states[i], scalars[:, i]) for i in index]


@dataclass
class _Pending:
    """A request's round between its draft and its verification."""

    token_ids: list[int]
    hidden_states: torch.Tensor  # [num_steps, hidden_size]
    scalars: torch.Tensor  # [4, num_steps] top1_prob, entropy, margin, drawn_logprob
    emitted: int
    temperature: float


class RoundRecorder:
    """The rounds recorded since the last flush.

    Args:
        fraction: of the requests, by a hash of their id.
        max_bytes: bound on the rounds kept in memory, and on ``folder``.
        requests: request id → vLLM's ``CachedRequestState``.
        take_accept_probs: min(1, p/q) of what was verified last, one [num_candidates] tensor a row; None if unknown.
        folder: where the engine writes shards by itself until the first :meth:`flush`; None: it never does.
    """

    def __init__(
        self,
        fraction: float,
        max_bytes: float,
        requests: Mapping[str, Any],
        take_accept_probs: Callable[[], list[torch.Tensor] | None],
        folder: RecordFolder | None = None,
    ) -> None:
        self._fraction = fraction
        self._max_bytes = max_bytes
        self._requests = requests
        self._take_accept_probs = take_accept_probs
        self._folder = folder
        self._full = False
        self._pending: dict[str, _Pending] = {}
        self._rounds: list[RoundRecord] = []
        self._writer = ThreadPoolExecutor(1, "specdecpp-record")  # starts its thread with the first shard
        self._writes: list[Future[None]] = []
        self._num_steps = self._num_bytes = self._num_dropped = 0

    def wants(self, request_id: str) -> bool:
        """Whether this request is recorded: always the same answer for the same id."""
        if self._full:
            return False
        digest = hashlib.sha256(request_id.encode()).digest()
        return int.from_bytes(digest[:8], "big") < self._fraction * 2**64

    def new_trace(self, rows: Sequence[RowState]) -> DraftTrace | None:
        """For the round of ``rows`` that is about to be drafted; None if none of them is recorded."""
        return DraftTrace() if any(self.wants(row.request_id) for row in rows) else None

    def drafted(self, rows: Sequence[RowState], candidates: Sequence[list[int]], trace: DraftTrace) -> None:
        """A round was drafted and goes to its verification.

        Args:
            rows: the batch.
            candidates: each row's submitted candidates.
            trace: the passes that they were drawn from.
        """
        for row, token_ids, (hidden_states, scalars) in zip(rows, candidates, trace.by_request(len(rows)), strict=True):
            if not token_ids or not self.wants(row.request_id):
                continue
            request = self._requests[row.request_id]
            params = request.sampling_params
            self._pending[row.request_id] = _Pending(
                token_ids=list(token_ids),
                hidden_states=hidden_states,
                scalars=scalars,
                emitted=row.next_position + 1 - request.num_prompt_tokens,
                temperature=0.0 if params is None else params.temperature,
            )

    def verified(self, rows: Sequence[RowState], outcomes: Mapping[int, tuple[int, int]]) -> None:
        """A batch was verified; the last drafts of requests without an outcome are dropped.

        Args:
            rows: the batch.
            outcomes: row → how many candidates the target has read (the scheduler may cut), and how many it accepted.
        """
        accept_probs = self._take_accept_probs()
        for index, (num_verified, num_accepted) in outcomes.items():
            draft = self._pending.get(rows[index].request_id)
            num = 0 if draft is None else min(num_verified, len(draft.token_ids))
            if draft is not None and num > 0:
                probs = None if accept_probs is None or len(accept_probs[index]) != num else accept_probs[index]
                self._complete(rows[index].request_id, draft, num, num_accepted, probs)
        self._pending.clear()
        if self._folder is not None and self._num_steps >= STEPS_PER_SHARD:
            self._write_to_folder()

    def _complete(
        self, request_id: str, draft: _Pending, num: int, num_accepted: int, accept_probs: torch.Tensor | None
    ) -> None:
        """Keep the first ``num`` steps of a draft; ``accept_probs``: [num] min(1, p/q)."""
        num_bytes = draft.hidden_states[:num].nbytes + num * 32 + 512
        if self._num_bytes + num_bytes > self._max_bytes:
            self._num_dropped += 1
            return
        # Greedy verification compares tokens, not probabilities: its only label is the outcome.
        soft_label = torch.full((num,), torch.nan)
        if accept_probs is not None and draft.temperature >= GREEDY_BELOW:
            soft_label = accept_probs.float().cpu()
        top1_prob, entropy, margin, drawn_logprob = draft.scalars[:, :num].clone()
        self._rounds.append(
            RoundRecord(
                request_id=request_id,
                hidden_states=draft.hidden_states[:num].clone(),
                token_ids=draft.token_ids[:num],
                top1_prob=top1_prob,
                entropy=entropy,
                margin=margin,
                drawn_logprob=drawn_logprob,
                soft_label=soft_label,
                num_accepted=num_accepted,
                num_verified=num,
                emitted=draft.emitted,
                temperature=draft.temperature,
            )
        )
        self._num_steps += num
        self._num_bytes += num_bytes

    def flush(self, path: str | None, prompts: Mapping[str, Mapping[str, str]] | None) -> dict[str, Any]:
        """Write one shard of everything since the last flush; from now on nothing is written without a flush.

        Args:
            path: ``DATASET/shards/NAME.safetensors``; None drops what was recorded.
            prompts: the caller's request id → {"id", "set"}; rounds of other requests are dropped. None keeps all.

        Returns:
            ``rounds``, ``steps``, ``observed`` (steps with a known outcome), ``accepted``, and ``dropped_rounds`` that
            did not fit into ``record_max_gib``.

        Raises:
            ValueError: the shard cannot be written; what was recorded is kept, so that the call can be repeated.
        """
        self.close()
        self._full = False
        owners = {r.request_id: _owner(r.request_id, prompts) for r in self._rounds}
        rounds = [r for r in self._rounds if owners[r.request_id] is not None]
        if path is not None:
            by_request = {request_id: owner for request_id, owner in owners.items() if owner is not None}
            manifest = open_dataset(Path(path).parents[1]).manifest
            listed = list((prompts or {}).values())
            shard = shard_from_rounds(rounds, by_request) if rounds else empty_shard(manifest, listed)
            write_shard(Path(path), shard, manifest)
        summary = {
            "rounds": len(rounds),
            "steps": sum(r.num_verified for r in rounds),
            "observed": sum(min(r.num_accepted + 1, r.num_verified) for r in rounds),
            "accepted": sum(r.num_accepted for r in rounds),
            "dropped_rounds": self._num_dropped,
        }
        self._clear()
        return summary

    def close(self) -> None:
        """Write what is left, if the engine records into a folder, and end that recording."""
        if self._folder is None:
            return
        if self._rounds and not self._full:
            self._write_to_folder()
        self.wait()
        self._writer.shutdown()
        self._folder.close()
        self._folder = None

    def wait(self) -> None:
        """Until every shard that the engine writes by itself is on disk."""
        for writing in self._writes:
            writing.result()

    def _clear(self) -> None:
        self._rounds = []
        self._num_steps = self._num_bytes = self._num_dropped = 0

    def _write_to_folder(self) -> None:
        """Hand the rounds to the writing thread: the engine does not wait for the disk."""
        self._writes = [writing for writing in self._writes if not writing.done()]
        if len(self._writes) < MAX_WAITING:  # else the disk cannot follow, and these rounds are lost
            self._writes.append(self._writer.submit(self._write, self._rounds))
        self._clear()

    def _write(self, rounds: list[RoundRecord]) -> None:
        assert self._folder is not None
        if self._full:
            return
        try:
            shard = shard_from_rounds(rounds, {r.request_id: {"id": r.request_id, "set": "server"} for r in rounds})
            self._full = not self._folder.write(shard, self._max_bytes)
            if self._full:
                gib = self._max_bytes / 2**30
                logger.info("specdecpp: recording stopped: %s has reached record_max_gib=%g", self._folder.path, gib)
        except Exception as error:  # whatever it is, recording must not take the server down
            self._full = True
            logger.warning("specdecpp: recording stopped: %s", error)


def _owner(request_id: str, prompts: Mapping[str, Mapping[str, str]] | None) -> Mapping[str, str] | None:
    """The prompt that a request answers; vLLM appends ``-`` and a random text to the caller's id."""
    if prompts is None:
        return {"id": request_id, "set": "server"}
    return prompts.get(request_id) or prompts.get(request_id.rpartition("-")[0])
