# SPDX-License-Identifier: Apache-2.0
"""Records what was drafted and what became of it: the training data of acceptance heads, from the engine's own rounds.

The proposer hands over a round's draft passes (:class:`DraftTrace`); at its next call it knows the outcome, and the
round is complete. Nothing here draws random numbers or changes what the engine does. Pure torch, no vLLM import.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_specdecpp.data.shard_file import RoundRecord, empty_shard, shard_from_rounds, write_shard
from vllm_specdecpp.data.shards import open_dataset
from vllm_specdecpp.decision.features import SCALAR_FEATURES, StepFeatures
from vllm_specdecpp.engine.v1.inputs import RowState

MAX_BYTES = 1 << 30
"""Of the rounds that are kept in memory until a flush; those beyond are dropped, and counted."""
GREEDY_BELOW = 1e-5
"""Temperatures that vLLM treats as 0 (``vllm.sampling_params._SAMPLING_EPS``)."""


class DraftTrace:
    """The draft passes of one round of a batch, kept on the device until the round's end."""

    needs = frozenset({"hidden_states", *SCALAR_FEATURES})
    """Fields of :class:`StepFeatures` that are recorded."""

    def __init__(self) -> None:
        self._rows: list[torch.Tensor] = []
        self._hidden_states: list[torch.Tensor] = []
        self._scalars: list[torch.Tensor] = []

    def step(self, rows: torch.Tensor, features: StepFeatures) -> None:
        """One pass and the candidates drawn from it.

        Args:
            rows: [num_rows] int64, the requests that drew a candidate.
            features: of ``rows``.
        """
        assert features.hidden_states is not None
        columns = (getattr(features, name) for name in SCALAR_FEATURES)
        self._rows.append(rows)
        self._hidden_states.append(features.hidden_states)
        self._scalars.append(torch.stack([column.float() for column in columns]))  # [3, num_rows]

    def by_request(self, num_reqs: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each request's hidden states [num_steps, hidden_size] and scalars [3, num_steps], on the CPU."""
        if not self._rows:
            return [(torch.empty(0), torch.empty(len(SCALAR_FEATURES), 0))] * num_reqs
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
    scalars: torch.Tensor  # [3, num_steps] SCALAR_FEATURES
    emitted: int
    temperature: float


class RoundRecorder:
    """The rounds recorded since the last flush.

    Args:
        requests: request id → vLLM's ``CachedRequestState``.
        take_accept_probs: min(1, p/q) of what was verified last, one [num_candidates] tensor a row; None if unknown.
    """

    def __init__(
        self, requests: Mapping[str, Any], take_accept_probs: Callable[[], list[torch.Tensor] | None]
    ) -> None:  # fmt: skip
        self._requests = requests
        self._take_accept_probs = take_accept_probs
        self._pending: dict[str, _Pending] = {}
        self._rounds: list[RoundRecord] = []
        self._num_bytes = self._num_dropped = 0

    def drafted(self, rows: Sequence[RowState], candidates: Sequence[list[int]], trace: DraftTrace) -> None:
        """A round was drafted and goes to its verification.

        Args:
            rows: the batch.
            candidates: each row's submitted candidates.
            trace: the passes that they were drawn from.
        """
        for row, token_ids, (hidden_states, scalars) in zip(rows, candidates, trace.by_request(len(rows)), strict=True):
            if not token_ids:
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

    def _complete(
        self, request_id: str, draft: _Pending, num: int, num_accepted: int, accept_probs: torch.Tensor | None
    ) -> None:
        """Keep the first ``num`` steps of a draft; ``accept_probs``: [num] min(1, p/q)."""
        num_bytes = draft.hidden_states[:num].nbytes + num * 32 + 512
        if self._num_bytes + num_bytes > MAX_BYTES:
            self._num_dropped += 1
            return
        # Greedy verification compares tokens, not probabilities: its only label is the outcome.
        soft_label = torch.full((num,), torch.nan)
        if accept_probs is not None and draft.temperature >= GREEDY_BELOW:
            soft_label = accept_probs.float().cpu()
        self._rounds.append(
            RoundRecord(
                request_id=request_id,
                hidden_states=draft.hidden_states[:num].clone(),
                token_ids=draft.token_ids[:num],
                **dict(zip(SCALAR_FEATURES, draft.scalars[:, :num].clone(), strict=True)),
                soft_label=soft_label,
                num_accepted=num_accepted,
                num_verified=num,
                emitted=draft.emitted,
                temperature=draft.temperature,
            )
        )
        self._num_bytes += num_bytes

    def flush(self, path: str | None, prompts: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
        """Write one shard of everything since the last flush.

        Args:
            path: ``DATASET/shards/NAME.safetensors``; None drops what was recorded.
            prompts: the caller's request id → {"id", "set"}; rounds of other requests are dropped.

        Returns:
            ``rounds``, ``steps``, ``observed`` (steps with a known outcome), ``accepted``, and ``dropped_rounds`` that
            did not fit into ``MAX_BYTES``.

        Raises:
            ValueError: the shard cannot be written; what was recorded is kept, so that the call can be repeated.
        """
        owners = {r.request_id: _owner(r.request_id, prompts) for r in self._rounds}
        rounds = [r for r in self._rounds if owners[r.request_id] is not None]
        if path is not None:
            by_request = {request_id: owner for request_id, owner in owners.items() if owner is not None}
            manifest = open_dataset(Path(path).parents[1]).manifest
            shard = shard_from_rounds(rounds, by_request) if rounds else empty_shard(manifest, list(prompts.values()))
            write_shard(Path(path), shard, manifest)
        summary = {
            "rounds": len(rounds),
            "steps": sum(r.num_verified for r in rounds),
            "observed": sum(min(r.num_accepted + 1, r.num_verified) for r in rounds),
            "accepted": sum(r.num_accepted for r in rounds),
            "dropped_rounds": self._num_dropped,
        }
        self._rounds = []
        self._num_bytes = self._num_dropped = 0
        return summary


def _owner(request_id: str, prompts: Mapping[str, Mapping[str, str]]) -> Mapping[str, str] | None:
    """The prompt that a request answers; vLLM appends ``-`` and a random text to the caller's id."""
    return prompts.get(request_id) or prompts.get(request_id.rpartition("-")[0])
