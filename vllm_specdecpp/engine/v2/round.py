# SPDX-License-Identifier: Apache-2.0
"""One drafting phase on the device: the decisions of ``decision.round``'s rounds, without asking the host.

Everything lives in buffers that keep their address, so a step can be recorded in a CUDA graph and replayed. The rule's
estimator is the one that V1 calls; what it reads of the logits comes from one pass over them
(``vllm_specdecpp.kernels.logits_summary``), and survival, lengths, stop mask and the -1 fill are one launch
(``vllm_specdecpp.kernels.threshold_tail``, or under the cost-aware rule that of ``engine.v2.cost_tail``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from vllm_specdecpp.decision.features import SCALAR_FEATURES, StepFeatures
from vllm_specdecpp.decision.rules import FixedRule, StopRule, ThresholdRule
from vllm_specdecpp.engine.v2.cost_tail import CostAwareTail
from vllm_specdecpp.engine.v2.requests import COLUMNS
from vllm_specdecpp.kernels.logits_summary import logits_summary, make_partials
from vllm_specdecpp.kernels.threshold_tail import threshold_tail

SUMMARY = ("top1_prob", "entropy", "margin")
"""The features that are made of the logits alone."""

NEVER = 2.0
"""A threshold above every 1 - survival."""


class DeviceRound:
    """What a round knows of each request of the batch, by row.

    Per step k = 1, 2, ...: :meth:`observe` the pass that yields candidate k's distribution, draw, :meth:`append`.
    ``observe`` runs before the draw and is not given its result, so the decision about candidate k + 1 rests on the
    prefix and Y_1..Y_{k-1} (lossless by signature, as in ``RoundState``).

    Args:
        draft_tokens: [max_num_reqs, num_speculative_steps] int64, where the candidates go; -1 after a request's last.
        confidences: [max_num_reqs, num_speculative_steps] float32, or None: estimated P(candidate k accepted), 0 where
            none was submitted (``DraftModelSpeculator.draft_token_confidence_probs``).
        agree: gives rank 0's tensor on every rank.
    """

    def __init__(
        self,
        draft_tokens: torch.Tensor,
        confidences: torch.Tensor | None = None,
        agree: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    ) -> None:
        max_num_reqs, device = draft_tokens.shape[0], draft_tokens.device

        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.draft_tokens = draft_tokens
        self.confidences = confidences
        self.agree = agree
        self.limits = zeros(max_num_reqs, COLUMNS, dtype=torch.int64)  # BatchRequests.table
        self.next_positions = zeros(max_num_reqs, dtype=torch.int64)  # of the token that the target emitted last
        self.max_lengths = zeros(max_num_reqs, dtype=torch.int32)
        self.lengths = zeros(max_num_reqs, dtype=torch.int32)
        self.running = zeros(max_num_reqs, dtype=torch.int32)
        self.survival = zeros(max_num_reqs, dtype=torch.float32)
        self.scores = zeros(max_num_reqs, dtype=torch.float32)
        self.token_ids = zeros(max_num_reqs, dtype=torch.int64)  # drawn in the last step, by every row
        self.any_running = zeros(1, dtype=torch.bool)  # what CUDA's IF nodes read
        self.threshold = zeros(1, dtype=torch.float32)
        self._summary = {name: zeros(max_num_reqs, dtype=torch.float32) for name in SUMMARY}
        self._argmax = zeros(max_num_reqs, dtype=torch.int64)
        self._partials: torch.Tensor | None = None  # made with the first logits
        self._previous = {name: zeros(max_num_reqs, dtype=torch.float32) for name in SCALAR_FEATURES}
        self._scored = False
        self.set_rule(FixedRule(), 1)

    def set_rule(self, rule: StopRule | CostAwareTail, min_length: int) -> None:
        """Put a rule in force; ``min_length`` is the least number of candidates that a :class:`StopRule` may stop at.

        A captured graph holds the rule that was in force, and a tail's own buffers.
        """
        self.rule = rule
        self.min_length = min_length
        self.threshold.fill_(rule.threshold if isinstance(rule, ThresholdRule) else NEVER)
        lagged = rule.estimator is not None and rule.estimator.lag > 0
        self._kept = [name for name in SCALAR_FEATURES if lagged and name in rule.needs]

    def start(
        self,
        num_reqs: int,
        seq_lens: torch.Tensor,  # [>= num_reqs] of what the target has just read, rejected candidates included
        num_rejected: torch.Tensor,  # [>= num_reqs]
        num_sampled: torch.Tensor,  # [>= num_reqs]; 0 while a prompt is not read to its end
    ) -> None:
        """Begin a round; ``limits`` holds its rows of ``BatchRequests.table`` already.

        One token of every round is the target's, so a request whose sequence may become ``end`` tokens long, and which
        has emitted the token at position p, drafts at most ``end - 2 - p`` candidates.
        """
        rows, beyond = slice(num_reqs), slice(num_reqs, None)
        next_positions = seq_lens[rows].long() - num_rejected[rows].long()  # [num_reqs]
        self.next_positions[rows] = next_positions
        room = torch.minimum(self.limits[rows, 0], self.limits[rows, 1] - 2 - next_positions).clamp_(min=0)
        self.max_lengths[rows] = torch.where(num_sampled[rows] > 0, room, 0).int()
        self.lengths[rows] = 0
        self.survival[rows] = 1.0
        self.running[rows] = (self.max_lengths[rows] > 0).int()
        self.draft_tokens[rows] = -1
        # A graph of a larger batch runs these rows too.
        for padding in (self.max_lengths, self.lengths, self.running, self.next_positions):
            padding[beyond] = 0
        if self.confidences is not None:
            self.confidences[rows] = 0.0

    def admit(self) -> None:
        """After :meth:`start`: under the cost-aware rule its parameters, loaded by now, say who drafts, and how far."""
        if isinstance(self.rule, CostAwareTail):
            self.rule.start(self.max_lengths, self.running)

    @property
    def num_passes(self) -> torch.Tensor:
        """[] int64, draft passes that were of use to somebody; the first one counts in any case."""
        counts = self.rule.widths > 0 if isinstance(self.rule, CostAwareTail) else self.lengths[None].amax(dim=1)
        return counts.sum().clamp(min=1)

    def observe(self, step: int, logits: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Score from the pass that yields candidate ``step``'s distribution, before that candidate is drawn.

        Args:
            step: k, 1-based.
            logits: [num_reqs, vocab_size] before temperature.
            hidden_states: [num_reqs, hidden_size].
        """
        rows = slice(logits.shape[0])
        estimator = self.rule.estimator
        # A lagged estimator scores the token before: at the first step a verified one, whose acceptance is certain.
        self._scored = estimator is not None and not (estimator.lag and step == 1)
        if estimator is None:
            return
        features = self._features(logits, hidden_states)
        if self._scored:
            if self._kept:
                previous: dict[str, Any] = {name: self._previous[name][rows] for name in self._kept}
                features = replace(features, previous=StepFeatures(**previous))
            self.scores[rows] = self.agree(estimator(features, step - estimator.lag).float())  # [num_reqs]
        for name in self._kept:
            # Nobody can know the draw yet: append() brings it.
            if name != "drawn_logprob" and (column := getattr(features, name)) is not None:
                self._previous[name][rows] = column
        if self.confidences is not None and not isinstance(self.rule, CostAwareTail):
            certain = self.scores[rows].nan_to_num(0.0).clamp(0, 1) if self._scored else 1.0
            self.confidences[rows, step - 1] = torch.where(self.running[rows] > 0, certain, 0.0)

    def _features(self, logits: torch.Tensor, hidden_states: torch.Tensor) -> StepFeatures:
        """What ``decision.features.features_from_logits`` gives, in buffers that the next pass overwrites."""
        wanted = [name for name in SUMMARY if name in self.rule.needs]
        if not wanted and "drawn_logprob" not in self._kept:
            return StepFeatures(hidden_states)
        if self._partials is None:
            self._partials = make_partials(len(self.running), logits.shape[1], logits.device)
        summary = {name: column[: len(logits)] for name, column in self._summary.items()}
        logits_summary(logits, argmax=self._argmax[: len(logits)], partials=self._partials, **summary)
        given: dict[str, Any] = {name: summary[name] for name in wanted}
        return StepFeatures(hidden_states, **given)

    def append(self, step: int, token_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Submit the drawn candidate of every running request, then end those that are through.

        Args:
            step: k, 1-based.
            token_ids: [num_reqs] int64, drawn by every row; ignored where the request is not running.
            logits: as in :meth:`observe`.

        Returns:
            [num_reqs] the column of ``draft_tokens``: candidate k, or -1.
        """
        num_reqs = len(token_ids)
        rows = slice(num_reqs)
        self.token_ids[rows] = token_ids
        if "drawn_logprob" in self._kept:
            # Relative to the largest, whose probability is known.
            pair = logits.gather(1, torch.stack((token_ids, self._argmax[rows]), dim=1)).float()  # [num_reqs, 2]
            log_top1 = self._summary["top1_prob"][rows].log()
            self._previous["drawn_logprob"][rows] = pair[:, 0] - pair[:, 1] + log_top1
        if isinstance(self.rule, CostAwareTail):
            self._append_cost_aware(self.rule, rows, step)
        else:
            self._append(rows, step)
        return self.draft_tokens[rows, step - 1]

    def _append(self, rows: slice, step: int) -> None:
        threshold_tail(
            self.scores[rows],
            self.token_ids[rows],
            step,
            survival=self.survival[rows],
            lengths=self.lengths[rows],
            running=self.running[rows],
            max_lengths=self.max_lengths[rows],
            min_length=self.min_length,
            threshold=self.threshold,
            stop_token_ids=self.limits[rows, 2:],
            draft_tokens=self.draft_tokens[rows],
            any_running=self.any_running,
            scored=self._scored,
        )

    def _append_cost_aware(self, tail: CostAwareTail, rows: slice, step: int) -> None:
        before = None if self.confidences is None else self.survival[rows].clone()
        tail.append(
            self.scores[rows],
            self.token_ids[rows],
            step,
            survival=self.survival[rows],
            lengths=self.lengths[rows],
            running=self.running[rows],
            stop_token_ids=self.limits[rows, 2:],
            draft_tokens=self.draft_tokens[rows],
            any_running=self.any_running,
        )
        if self.confidences is not None and before is not None:
            # The calibrated estimate, which this step has multiplied the survival by.
            certain = self.survival[rows] / before.clamp(min=1e-30)
            self.confidences[rows, step - 1] = torch.where(self.draft_tokens[rows, step - 1] >= 0, certain, 0.0)
