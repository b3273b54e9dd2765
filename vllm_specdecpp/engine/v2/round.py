# SPDX-License-Identifier: Apache-2.0
"""The round on the device: limits and logit features for ``decision.round``, never asking the host.

What the rule reads of the logits comes from one pass over them (``vllm_specdecpp.kernels.logits_summary``); the tails
are one launch each. So a step can be recorded in a CUDA graph and replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vllm_specdecpp.decision.cost_aware.tail import CostAwareTail
from vllm_specdecpp.decision.features import SCALAR_FEATURES, StepFeatures
from vllm_specdecpp.decision.round import DraftRound
from vllm_specdecpp.decision.rules import FixedRule, StopRule, tail_threshold
from vllm_specdecpp.engine.v2.requests import COLUMNS
from vllm_specdecpp.kernels.logits_summary import logits_summary, make_partials
from vllm_specdecpp.kernels.threshold_tail import threshold_tail
from vllm_specdecpp.rule_registry import no_device_tail


class DeviceRound(DraftRound):
    """A :class:`DraftRound` of the batch's first rows, whatever its size.

    Args:
        draft_tokens: [max_num_reqs, num_speculative_steps] int64, where the candidates go; -1 after a request's last.
        confidences: [max_num_reqs, num_speculative_steps] float32, or None: estimated P(candidate k accepted), 0 where
            none was submitted (``DraftModelSpeculator.draft_token_confidence_probs``).
        agree: gives rank 0's tensor on every rank; None where there is only one.
    """

    def __init__(
        self,
        draft_tokens: torch.Tensor,
        confidences: torch.Tensor | None = None,
        agree: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        max_num_reqs, device = draft_tokens.shape[0], draft_tokens.device
        self.limits = torch.zeros(max_num_reqs, COLUMNS, dtype=torch.int64, device=device)  # BatchRequests.table
        self.next_positions = torch.zeros(max_num_reqs, dtype=torch.int64, device=device)  # of the target's last token
        super().__init__(
            FixedRule(), torch.zeros(max_num_reqs, dtype=torch.int32, device=device),
            stop_token_ids=self.limits[:, 2:], draft_tokens=draft_tokens, threshold_tail=threshold_tail,
        )  # fmt: skip
        self.agree_drawn = agree
        self.confidences = confidences
        self._summary = {name: torch.zeros_like(self.survival) for name in SCALAR_FEATURES}
        self._argmax = torch.zeros_like(self.token_ids)
        self._partials: torch.Tensor | None = None  # made with the first logits

    def set_rule(self, rule: StopRule | CostAwareTail, min_length: int) -> None:
        """See :meth:`DraftRound.set_rule`.

        Raises:
            ValueError: no kernel decides as the rule does; the one before stays in force.
        """
        if not isinstance(rule, CostAwareTail) and tail_threshold(rule) is None:
            raise ValueError(
                f"specdecpp: {no_device_tail(rule.name)}; set VLLM_USE_V2_MODEL_RUNNER=0, or choose another rule"
            )
        super().set_rule(rule, min_length)

    def warm(self) -> None:
        """Compile what decides for batches of every size, between two rounds: nothing is compiled in service."""
        if not isinstance(self.rule, CostAwareTail):
            return  # one kernel serves all sizes
        most, size = len(self.running), 1
        while size < 2 * most:
            self.begin()
            self._scored = True
            self.append(self.token_ids[: min(size, most)], slice(min(size, most)))
            size *= 2
        self.begin()

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
        next_positions = torch.sub(seq_lens[rows], num_rejected[rows], out=self.next_positions[rows])  # [num_reqs]
        room = torch.minimum(self.limits[rows, 0], self.limits[rows, 1] - 2 - next_positions).clamp_(min=0)
        torch.mul(room, num_sampled[rows] > 0, out=self.max_lengths[rows])
        # A graph of a larger batch runs these rows too.
        self.max_lengths[beyond] = self.next_positions[beyond] = 0
        self.draft_tokens[rows] = -1
        if self.confidences is not None:
            self.confidences[rows] = 0.0
        self.begin()

    @property
    def num_later_passes(self) -> torch.Tensor:
        """[] int32, draft passes behind the first one that were of use to somebody."""
        if isinstance(self.rule, CostAwareTail):
            return torch.count_nonzero(self.rule.widths[1:]).int()
        return (self.lengths.amax() - 1).clamp(min=0)

    def observe_pass(self, step: int, logits: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """:meth:`observe` a pass of the first ``num_reqs`` rows.

        Args:
            step: k, 1-based.
            logits: [num_reqs, vocab_size] before temperature.
            hidden_states: [num_reqs, hidden_size].
        """
        self.num_drawn = step - 1
        self.observe(self._features(logits, hidden_states), slice(len(logits)))

    def _features(self, logits: torch.Tensor, hidden_states: torch.Tensor) -> StepFeatures:
        """What ``decision.features.features_from_logits`` gives, in buffers that the next pass overwrites."""
        wanted = [name for name in SCALAR_FEATURES if name in self.needs]
        if not wanted:
            return StepFeatures(hidden_states)
        if self._partials is None:
            self._partials = make_partials(len(self.running), logits.shape[1], logits.device)
        summary = {name: column[: len(logits)] for name, column in self._summary.items()}
        logits_summary(logits, argmax=self._argmax[: len(logits)], partials=self._partials, **summary)
        given: dict[str, Any] = {name: summary[name] for name in wanted}
        return StepFeatures(hidden_states, **given)

    def append_drawn(self, token_ids: torch.Tensor) -> torch.Tensor:
        """:meth:`append` what the first ``num_reqs`` rows drew.

        Args:
            token_ids: [num_reqs] int64, drawn by every row.

        Returns:
            [num_reqs] the column of ``draft_tokens``: candidate k, or -1.
        """
        rows = slice(len(token_ids))
        if self.agree_drawn is not None:
            # One broadcast a pass: what was scored before the draw, and the draw.
            packed = torch.stack((token_ids, self.scores[rows].view(torch.int32).long()))  # [2, num_reqs]
            token_ids, scores = self.agree_drawn(packed)
            self.scores[rows] = scores.int().view(torch.float32)
        before = None if self.confidences is None else self.survival[rows].clone()
        column = self.append(token_ids, rows)
        if self.confidences is not None and before is not None:
            # The estimate in force, which this step has multiplied the survival by: the candidate's own, or, with a
            # lag, that of the one before, which stands for its own until a next step knows better.
            certain, there = self.survival[rows] / before.clamp(min=1e-30), column >= 0
            self.confidences[rows, self.num_drawn - 1] = torch.where(there, certain, 0.0)
            if self.rule.estimator is not None and self.rule.estimator.lag and self.num_drawn > 1:
                late = self.confidences[rows, self.num_drawn - 2]
                late.copy_(torch.where(there, certain, late))
        return column
