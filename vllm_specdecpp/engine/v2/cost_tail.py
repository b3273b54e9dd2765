# SPDX-License-Identifier: Apache-2.0
"""The cost-aware rule's part of a device round: ``CostAwareRound.step`` and ``end``, one launch a step.

Everything lives in buffers that keep their address. What decides is loaded once a round, before its first step; what
the rule learns from is reported back once a round, behind its last one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vllm_specdecpp.decision.cost_aware.logistic import BUCKETS
from vllm_specdecpp.decision.estimator import Estimator
from vllm_specdecpp.kernels.cost_aware_params import CostAwareParams
from vllm_specdecpp.kernels.cost_aware_tail import MAX_REQS, cost_aware_tail, cost_aware_tail_torch


class CostAwareTail:
    """Decides who submits candidate k and who draws candidate k + 1.

    Args:
        estimator: scores the candidates.
        max_reqs: largest batch; beyond ``MAX_REQS`` the kernel's torch twin runs.
        max_length: K, columns of the draft tokens.
        max_tokens: entries of the verification's cost table, less one.
        device: of the draft model.

    Attributes:
        params: what rank 0 loads, or hands on, each round.
        drafts: [max_reqs] int32, 1 for the requests that the round began with.
        widths: [max_length] int32, requests that looked at candidate 1, 2, ...; 0 once nobody did.
    """

    name = "cost_aware"

    def __init__(
        self, estimator: Estimator, max_reqs: int, max_length: int, max_tokens: int, device: torch.device | str
    ) -> None:
        self.estimator, self.needs = estimator, estimator.needs
        self.params = CostAwareParams.allocate(max_reqs, max_length, max_tokens, BUCKETS, device)
        self.drafts = torch.zeros(max_reqs, dtype=torch.int32, device=device)
        self.widths = torch.zeros(max_length, dtype=torch.int32, device=device)
        self._expected = torch.zeros(max_reqs, dtype=torch.float32, device=device)
        self._scores = torch.zeros(max_length, max_reqs, dtype=torch.float32, device=device)
        self._launch: Any = cost_aware_tail if max_reqs <= MAX_REQS else cost_aware_tail_torch

    def open(self) -> None:
        """Let the next round draft as long as it may: warm-up and capture, before there are costs to decide by."""
        self.params.packed.zero_()
        self.params.limits.fill_(1 << 30)
        self.params.held.fill_(1)

    def start(self, max_lengths: torch.Tensor, running: torch.Tensor) -> None:
        """Begin a round; ``params`` are loaded.

        Args:
            max_lengths: [max_reqs] int32, what each request has room for, which the host may not know yet; 0 in the
                rows behind the batch.
            running: [max_reqs] int32, out: the requests that draft.
        """
        limits = self.params.limits
        torch.minimum(limits, max_lengths, out=limits)
        running.copy_(limits > 0)
        self.drafts.copy_(running)
        self.widths.zero_()
        self._expected.zero_()

    def append(
        self,
        scores: torch.Tensor,
        token_ids: torch.Tensor,
        step: int,
        *,
        survival: torch.Tensor,
        lengths: torch.Tensor,
        running: torch.Tensor,
        stop_token_ids: torch.Tensor,
        draft_tokens: torch.Tensor,
        any_running: torch.Tensor,
    ) -> None:
        """Decide about step k and take in its draw; arguments as in ``kernels.cost_aware_tail``."""
        num_reqs = len(scores)
        self._launch(
            scores,
            token_ids,
            step,
            survival=survival,
            expected=self._expected[:num_reqs],
            lengths=lengths,
            running=running,
            params=self.params,
            stop_token_ids=stop_token_ids,
            draft_tokens=draft_tokens,
            any_running=any_running,
            scores_log=self._scores[:, :num_reqs],
            widths=self.widths,
            lag=self.estimator.lag,
        )

    def report(self, num_reqs: int, max_lengths: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """What the host's round is filled with (:meth:`Report.of`): [size] float32, one tensor to copy.

        Args:
            num_reqs: in the batch.
            max_lengths: [>= num_reqs] int32, as in :meth:`start`.
            lengths: [>= num_reqs] int32, candidates submitted.
        """
        rows = slice(num_reqs)
        whole = (self.widths, self.params.limits[rows], max_lengths[rows], self.drafts[rows], lengths[rows])
        parts = [self.params.explore_seconds, *(part.float() for part in whole), self._expected[rows]]
        return torch.cat([*parts, self._scores[:, rows].flatten()])


@dataclass(frozen=True)
class Report:
    """A round as the device has left it, on the host."""

    explore_seconds: float
    """What is left of the time set apart."""
    widths: torch.Tensor
    limits: torch.Tensor
    max_lengths: torch.Tensor
    drafts: torch.Tensor
    lengths: torch.Tensor
    expected: torch.Tensor
    scores: torch.Tensor
    """[max_length, num_reqs] log-odds; rows of steps that were not run hold those of a round before."""

    @classmethod
    def of(cls, packed: torch.Tensor, num_reqs: int, max_length: int) -> Report:
        """Take :meth:`CostAwareTail.report` apart."""
        explore, widths, limits, room, drafts, lengths, expected, scores = packed.split(
            [1, max_length, *[num_reqs] * 5, max_length * num_reqs]
        )
        return cls(
            explore_seconds=float(explore),
            widths=widths.long(),
            limits=limits.long(),
            max_lengths=room.long(),
            drafts=drafts.long(),
            lengths=lengths.long(),
            expected=expected,
            scores=scores.view(max_length, num_reqs),
        )
