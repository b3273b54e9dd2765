# SPDX-License-Identifier: Apache-2.0
"""The cost-aware rule's part of a :class:`DraftRound`: who submits candidate k, who draws candidate k + 1.

Everything lives in buffers that keep their address. What decides is loaded once a round, before its first step; what
the rule learns from is reported back once a round, behind its last one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_specdecpp.decision import tails
from vllm_specdecpp.decision.cost_aware.logistic import BUCKETS
from vllm_specdecpp.decision.estimator import Estimator
from vllm_specdecpp.decision.tail_params import CostAwareParams

WHOLE = 3
"""Of a report's numbers of a request, those that are whole: limit, candidates, whether it drafts."""


class CostAwareTail:
    """What a round under the cost-aware rule has in the place of a stop rule.

    Args:
        estimator: scores the candidates.
        max_reqs: largest batch.
        max_length: K, columns of the draft tokens.
        max_tokens: entries of the verification's cost table, less one.
        device: of the draft model.
        launch: ``tails.cost_aware_tail``, or the kernel's launcher.

    Attributes:
        params: what rank 0 loads, or hands on, each round.
        drafts: [max_reqs] int32, 1 for the requests that the round began with.
        expected: [max_reqs] float32, estimated number of accepted candidates.
        widths: [max_length] int32, requests that looked at candidate 1, 2, ...; 0 once nobody did.
    """

    name = "cost_aware"

    def __init__(
        self, estimator: Estimator, max_reqs: int, max_length: int, max_tokens: int, device: torch.device | str,
        launch: Any = tails.cost_aware_tail,
    ) -> None:  # fmt: skip
        self.estimator, self.needs = estimator, estimator.needs
        self.params = CostAwareParams.allocate(max_reqs, max_length, max_tokens, BUCKETS, device)
        # One buffer, so that all of it is reported by one copy.
        self._packed = torch.zeros((WHOLE + 1 + max_length) * max_reqs + max_length, device=device)
        rows, widths = self._packed[:-max_length].view(-1, max_reqs), self._packed[-max_length:]
        self._limits, self._lengths, self.drafts = rows[:WHOLE].view(torch.int32)
        self._scores, self.expected = rows[WHOLE:-1], rows[-1]
        self.widths = widths.view(torch.int32)
        self._sums = self._packed[-max_length - max_reqs :]  # expected and widths
        self._launch = launch

    def open(self) -> None:
        """Let the next round draft as long as it may: warm-up and capture, before there are costs to decide by."""
        self.params.packed.zero_()  # a price of 0
        self.params.limits.fill_(1 << 30)

    def start(self, max_lengths: torch.Tensor, running: torch.Tensor) -> None:
        """Begin a round; ``params`` are loaded.

        Args:
            max_lengths: [num_reqs] int32, what each request has room for, which the host may not know yet; 0 in the
                rows behind the batch.
            running: [num_reqs] int32, out: the requests that draft.
        """
        rows = slice(len(max_lengths))
        limits = self.params.limits[rows]
        torch.minimum(limits, max_lengths, out=limits)
        self.drafts[rows] = torch.gt(limits, 0, out=running)
        self._sums.zero_()

    def append(self, scores: torch.Tensor, token_ids: torch.Tensor, step: int, **state: torch.Tensor) -> None:
        """Decide about step k and take in its draw.

        Args:
            scores, token_ids, step: as in :func:`tails.cost_aware_tail`.
            state: its ``survival``, ``lengths``, ``running``, ``stop_token_ids``, ``draft_tokens``, ``any_running``.
        """
        rows = slice(len(scores))
        self._launch(
            scores, token_ids, step, expected=self.expected[rows], params=self.params,
            scores_log=self._scores[:, rows], widths=self.widths, lag=self.estimator.lag, **state,
        )  # fmt: skip

    def standing(self, survival: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """:func:`tails.standing` of the round."""
        return tails.standing(self._scores[:, : len(survival)], survival, step, self.estimator.lag, self.params)

    def reach(self, lengths: torch.Tensor) -> torch.Tensor:
        """:func:`tails.reach` of the round."""
        return tails.reach(self._scores[:, : len(lengths)], self.widths, lengths, self.estimator.lag, self.params)

    def left(self, num_reqs: int) -> dict[str, Any]:
        """What the steps have left of the first requests, by the names of :func:`.device_runs.behind_drafts`."""
        rows = slice(num_reqs)
        return {
            "drafts": self.drafts[rows], "expected": self.expected[rows], "scores_log": self._scores[:, rows],
            "widths": self.widths, "params": self.params, "lag": self.estimator.lag,
        }  # fmt: skip

    def report(self, lengths: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        """What the host's round is filled with (:meth:`Report.of`): [size] float32, one tensor to copy.

        Args:
            lengths: [num_reqs] int32, candidates submitted.
            more: float32, to be put behind it.
        """
        self._limits.copy_(self.params.limits)
        self._lengths[: len(lengths)] = lengths
        return torch.cat((self._packed, *more))


@dataclass(frozen=True)
class Report:
    """A round as the tail has left it, on the host."""

    widths: np.ndarray
    limits: np.ndarray
    drafts: np.ndarray
    lengths: np.ndarray
    expected: np.ndarray
    scores: np.ndarray
    """[max_length, num_reqs] log-odds; rows of steps that were not run hold those of a round before."""

    @classmethod
    def of(cls, packed: np.ndarray, num_reqs: int, max_length: int) -> Report:
        """Take :meth:`CostAwareTail.report` apart."""
        widths = packed[-max_length:].view(np.int32)
        rows = packed[:-max_length].reshape(WHOLE + 1 + max_length, -1)[:, :num_reqs]
        limits, lengths, drafts = rows[:WHOLE].view(np.int32).astype(np.int64)
        return cls(widths, limits, drafts, lengths, rows[-1], rows[WHOLE:-1])
