# SPDX-License-Identifier: Apache-2.0
"""One drafting phase of a batch: survival, lengths, and who goes on; for both runners, and replays of stop rules.

Per step k = 1, 2, ...: :meth:`DraftRound.observe` the pass that yields candidate k's distribution, draw,
:meth:`DraftRound.append`.

Lossless by signature: ``observe`` runs before the draw and is not given its result. The scores that it leaves, the
state and the rule's parameters are all that the tail (``decision.tails``) decides by: whether candidate k is submitted,
and whether candidate k + 1 is drawn, is a function of the prefix and Y_1..Y_{k-1}. The drawn token is recorded, and
ends its request's draft if it is a stop token, after it was submitted. No rule sees a token that it decides about.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vllm_specdecpp.decision import tails
from vllm_specdecpp.decision.cost_aware.tail import CostAwareTail
from vllm_specdecpp.decision.features import StepFeatures
from vllm_specdecpp.decision.rules import NEVER, StopRule, tail_threshold

Rows = Tensor | slice
"""Which requests: [num_rows] int64 indices, or a slice."""


def _own(tensor: Tensor) -> Tensor:
    return tensor


class DraftRound:
    """What a round knows of each request, in buffers that keep their address.

    Args:
        rule: a stop rule, or the tail of the cost-aware rule, its parameters loaded.
        max_lengths: [max_num_reqs] upper bounds on the candidate lengths; 0 drafts nothing for the request.
        min_length: a :class:`StopRule` may not stop a request below this many candidates.
        stop_token_ids: [num_stop], or [max_num_reqs, num_stop] padded with -1: tokens that end a draft. None: none.
        draft_tokens: [max_num_reqs, K] int64, where the candidates go, -1 after a request's last; None: a new one.
        agree: gives rank 0's tensor on every rank: ranks that decided otherwise would run other passes, and hang.
        threshold_tail: ``tails.threshold_tail``, or the kernel's launcher.

    Attributes:
        needs: fields of :class:`StepFeatures` that are read.
        lengths: [max_num_reqs] int32, candidates submitted.
        running: [max_num_reqs] int32, 1 for the requests that the next pass is for.
        survival: [max_num_reqs] float32, estimated P(all candidates scored so far are accepted); 1 at the start.
        any_running: [1] bool, whether some request draws another candidate.
        num_drawn: candidates drawn so far.
    """

    def __init__(
        self,
        rule: StopRule | CostAwareTail,
        max_lengths: Tensor,
        *,
        min_length: int = 1,
        stop_token_ids: Tensor | None = None,
        draft_tokens: Tensor | None = None,
        agree: Callable[[Tensor], Tensor] = _own,
        threshold_tail: Callable[..., None] = tails.threshold_tail,
    ) -> None:
        num_reqs, device = len(max_lengths), max_lengths.device
        self.agree = agree
        self._threshold_tail = threshold_tail
        if stop_token_ids is None:
            stop_token_ids = max_lengths.new_zeros(num_reqs, 0)
        self.stop_token_ids = stop_token_ids.to(device).expand(num_reqs, -1)
        if draft_tokens is None:
            longest = int(max_lengths.max()) if num_reqs else 0
            draft_tokens = torch.full((num_reqs, longest), -1, device=device)
        self.draft_tokens = draft_tokens
        self.max_lengths = max_lengths.int()
        self.lengths = torch.zeros_like(self.max_lengths)
        self.running = torch.zeros_like(self.max_lengths)
        self.survival = torch.ones(num_reqs, device=device)
        self.scores = torch.zeros(num_reqs, device=device)
        self.token_ids = torch.zeros(num_reqs, dtype=torch.int64, device=device)  # drawn in the last step
        self.any_running = torch.zeros(1, dtype=torch.bool, device=device)  # what CUDA's IF nodes read
        self.threshold = torch.zeros(1, device=device)
        self._scored: bool | None = None  # None: nothing was observed since the last draw
        self.set_rule(rule, min_length)
        self.begin()
        self.admit()

    def set_rule(self, rule: StopRule | CostAwareTail, min_length: int) -> None:
        """Put a rule in force; a captured graph holds the rule that was in force, and a tail's own buffers."""
        self.rule, self.needs, self.min_length = rule, rule.needs, min_length
        threshold = NEVER if isinstance(rule, CostAwareTail) else tail_threshold(rule)
        self._asks = threshold is None
        self.threshold.fill_(NEVER if threshold is None else threshold)

    def begin(self) -> None:
        """A round begins; ``max_lengths`` are set."""
        self.lengths.zero_()
        self.survival.fill_(1.0)
        torch.gt(self.max_lengths, 0, out=self.running)
        self.num_drawn, self._scored = 0, None

    def admit(self) -> None:
        """After :meth:`begin`: under the cost-aware rule its parameters, loaded by now, say who drafts, and how far."""
        if isinstance(self.rule, CostAwareTail):
            self.rule.start(self.max_lengths, self.running)

    def goes_on(self) -> bool:
        """Whether some request still drafts. Waits for the device."""
        return bool(self.running.any())

    def observe(self, features: StepFeatures, rows: Rows = slice(None)) -> None:
        """Score from the pass that yields the next candidate's distribution, before that candidate is drawn.

        Args:
            features: of ``rows``.
            rows: must cover the running requests.
        """
        estimator = self.rule.estimator
        # A lagged estimator scores the token before: at the first step a verified one, whose acceptance is certain.
        self._scored = estimator is not None and not (estimator.lag and self.num_drawn == 0)
        if self._scored and estimator is not None:
            # No lag: the candidate about to be drawn. Lag 1: the one drawn last.
            self.scores[rows] = self.agree(estimator(features, self.num_drawn + 1 - estimator.lag).float())
        if self._asks:
            self._ask()

    def append(self, token_ids: Tensor, rows: Rows = slice(None)) -> Tensor:
        """Submit the drawn candidates, then end the requests that are through.

        Under a :class:`StopRule` every running request submits. The cost-aware rule may leave out a candidate that it
        has just seen the chances of; that, too, was settled before the draw.

        Args:
            token_ids: [num_rows] int64, the drawn tokens of ``rows``; ignored where a request is not running.
            rows: as in :meth:`observe`. A slice from 0 on: the tail runs over these rows alone.

        Returns:
            [num_reqs] the column of ``draft_tokens``: candidate k, or -1.

        Raises:
            RuntimeError: :meth:`observe` was not called for this candidate.
        """
        if self._scored is None:
            raise RuntimeError("DraftRound.append needs one observe() before every candidate")
        self.token_ids[rows] = token_ids
        self.num_drawn += 1
        part = rows if isinstance(rows, slice) else slice(None)
        state: dict[str, Tensor] = {
            "survival": self.survival[part], "lengths": self.lengths[part], "running": self.running[part],
            "stop_token_ids": self.stop_token_ids[part], "draft_tokens": self.draft_tokens[part],
            "any_running": self.any_running,
        }  # fmt: skip
        scores, drawn = self.scores[part], self.token_ids[part]
        if isinstance(self.rule, CostAwareTail):
            self.rule.append(scores, drawn, self.num_drawn, **state)
        else:
            self._threshold_tail(
                scores, drawn, self.num_drawn, max_lengths=self.max_lengths[part], min_length=self.min_length,
                threshold=self.threshold, scored=self._scored, **state,
            )  # fmt: skip
        self._scored = None
        return self.draft_tokens[part, self.num_drawn - 1]

    def _ask(self) -> None:
        """A rule with logic of its own is asked now, on the host: where it stops, the next candidate is the limit."""
        assert not isinstance(self.rule, CostAwareTail)
        if self._scored:
            tails.take_scores(self.survival, self.scores, self.running.bool())
            self._scored = False  # once is enough
        stops = self.agree(self.rule.should_stop(self.survival.clone(), self.num_drawn))  # it may keep it
        if self.num_drawn + 1 >= self.min_length:
            self.max_lengths.copy_(torch.where(stops, self.lengths + 1, self.max_lengths))
