# SPDX-License-Identifier: Apache-2.0
"""One drafting phase of a batch: survival, lengths, and who goes on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_specdecpp.decision.cost_aware.drafting import CostAwareRound
from vllm_specdecpp.decision.estimator import Estimator
from vllm_specdecpp.decision.features import SCALAR_FEATURES, StepFeatures
from vllm_specdecpp.decision.rules import StopRule


def _identity(decision: Tensor) -> Tensor:
    return decision


class DraftRound(ABC):
    """One drafting phase, whatever decides it; see :class:`RoundState` and :class:`CostAwareState`.

    Per step: :meth:`observe` the pass that yields candidate k's distribution, draw for :attr:`drawing`, then
    :meth:`append`. What is decided about candidate k is decided in ``observe``, which has only the prefix and
    Y_1..Y_{k-1} to decide on; ``append`` submits every candidate that was drawn. So no rule can see a token that it
    decides about (lossless by signature). A stop token ends a request's round after it was submitted.

    Attributes:
        needs: fields of :class:`StepFeatures` that are read.
        lengths: [num_reqs] int64, candidates submitted.
        running: [num_reqs] bool, requests that the next pass is for.
        drawing: [num_reqs] bool, those of them that draw and submit candidate k; right after ``observe``.
    """

    drawing: Tensor

    def __init__(
        self,
        estimator: Estimator | None,
        needs: frozenset[str],
        running: Tensor,
        stop_token_ids: Tensor | None,
        agree: Callable[[Tensor], Tensor],
    ) -> None:
        self.needs = needs
        self.stop_token_ids = None if stop_token_ids is None else stop_token_ids.to(running.device)
        self.agree = agree
        self.lengths = torch.zeros_like(running, dtype=torch.int64)
        self.running = running
        self._num_drawn = 0
        # Only a lagged estimator reads the pass before.
        lagged = estimator is not None and estimator.lag > 0
        self._kept = [name for name in SCALAR_FEATURES if lagged and name in needs]
        self._previous: dict[str, Tensor] = {}  # name -> [num_reqs], of the pass that yielded the last candidate
        self._current: dict[str, Tensor] = {}  # name -> [num_reqs], of the pass observed last

    @abstractmethod
    def observe(self, features: StepFeatures, rows: Tensor | None = None) -> None:
        """Take in the pass that yields the next candidate's distribution, before that candidate is drawn.

        Args:
            features: of all requests, or of ``rows`` only.
            rows: [num_rows] int64 indices of the requests that ``features`` describes; must cover the running ones.
        """

    @abstractmethod
    def append(self, token_ids: Tensor, rows: Tensor | None = None, drawn_logprobs: Tensor | None = None) -> None:
        """Submit the drawn candidate of every request in :attr:`drawing`, then end those that are through.

        Args:
            token_ids: [num_reqs] the drawn tokens, or [num_rows] those of ``rows``; ignored where none is drawn.
            rows: [num_rows] int64 indices, as in :meth:`observe`; must cover :attr:`drawing`.
            drawn_logprobs: [num_reqs], or [num_rows], log-probabilities of the drawn tokens at temperature 1; wanted if
                the rule needs ``drawn_logprob``.

        Raises:
            RuntimeError: :meth:`observe` was not called for this candidate.
        """

    def any_running(self) -> bool:
        """Whether some request still drafts. Waits for the device."""
        return bool(self.running.any())

    def _score(self, estimator: Estimator | None, features: StepFeatures, rows: Tensor | None) -> Tensor | None:
        """The estimate for each of ``rows``, [num_rows] float32, NaN where it is broken; None: there is none yet."""
        # A lagged estimator scores the token before: at the first step a verified one, whose acceptance is certain.
        if estimator is None or (estimator.lag and self._num_drawn == 0):
            return None
        if self._kept:
            index = slice(None) if rows is None else rows
            previous: dict[str, Any] = {name: column[index] for name, column in self._previous.items()}  # [num_rows]
            features = replace(features, previous=StepFeatures(**previous))
        # No lag: the candidate about to be drawn. Lag 1: the one drawn last.
        return estimator(features, self._num_drawn + 1 - estimator.lag).float()

    def _remember(self, features: StepFeatures, rows: Tensor | None) -> None:
        """Keep what a lagged estimator will read of this pass at the next."""
        self._current = {}
        for name in self._kept:
            # Nobody can know the draw yet: append() brings it.
            if name != "drawn_logprob" and (column := getattr(features, name)) is not None:
                self._current[name] = self._per_request(column, rows)

    def _submitted(self, drawn_logprobs: Tensor | None, rows: Tensor | None) -> None:
        """One candidate more was drawn: what was the current pass is the previous one now."""
        self._previous = self._current
        if drawn_logprobs is not None and "drawn_logprob" in self._kept:
            self._previous["drawn_logprob"] = self._per_request(drawn_logprobs, rows)
        self._num_drawn += 1

    def _goes_on(self, token_ids: Tensor, rows: Tensor | None) -> Tensor:
        """[num_reqs] False where the drawn token ends the request."""
        out = torch.ones_like(self.running)
        if self.stop_token_ids is not None:
            index = slice(None) if rows is None else rows
            stop_token_ids = self.stop_token_ids[index] if self.stop_token_ids.dim() == 2 else self.stop_token_ids[None]
            out[index] = (token_ids[:, None] != stop_token_ids).all(dim=1)  # [num_rows]
        return out

    def _per_request(self, values: Tensor, rows: Tensor | None) -> Tensor:
        """``values`` [num_rows] of ``rows`` as [num_reqs] float32; NaN, which no running request reads, elsewhere."""
        if rows is None:
            return values.float()
        out = torch.full(self.lengths.shape, torch.nan, device=self.lengths.device)
        out[rows] = values.float()
        return out


class RoundState(DraftRound):
    """A round under a :class:`StopRule`, which says before candidate k is drawn whether it is the last one.

    Args:
        rule: the stop rule.
        max_lengths: [num_reqs] int64, upper bound on the candidate length; 0 drafts nothing for the request.
        min_length: the rule may not stop a request below this many candidates.
        stop_token_ids: [num_stop_tokens], or [num_reqs, num_stop_tokens] padded with -1; tokens that end a draft.
        agree: maps the stop decision [num_reqs] bool to one that is the same on every rank.

    Attributes:
        survival: [num_reqs] float32, estimated P(all candidates scored so far are accepted); 1 at the start.
    """

    def __init__(
        self,
        rule: StopRule,
        max_lengths: Tensor,
        *,
        min_length: int = 1,
        stop_token_ids: Tensor | None = None,
        agree: Callable[[Tensor], Tensor] = _identity,
    ) -> None:
        super().__init__(rule.estimator, rule.needs, max_lengths > 0, stop_token_ids, agree)
        self.rule = rule
        self.max_lengths = max_lengths.long()
        self.min_length = min_length
        self.survival = torch.ones_like(max_lengths, dtype=torch.float32)
        self._last: Tensor | None = None  # [num_reqs] bool, whether the next candidate is the request's last

    def observe(self, features: StepFeatures, rows: Tensor | None = None) -> None:
        estimate = self._score(self.rule.estimator, features, rows)
        if estimate is not None:
            # A broken estimate ends the draft, not the server.
            estimate = torch.nan_to_num(estimate, nan=0.0).clamp(0, 1)
            scores = torch.ones_like(self.survival)  # [num_reqs]
            scores[slice(None) if rows is None else rows] = estimate
            self.survival = torch.where(self.running, self.survival * scores, self.survival)
        self._remember(features, rows)
        stop = self.rule.should_stop(self.survival, self._num_drawn)  # [num_reqs]
        self._last = self.agree(stop & (self._num_drawn + 1 >= self.min_length))
        self.drawing = self.running

    def append(self, token_ids: Tensor, rows: Tensor | None = None, drawn_logprobs: Tensor | None = None) -> None:
        if self._last is None:
            raise RuntimeError("RoundState.append needs one observe() before every candidate")
        self.lengths = self.lengths + self.running
        self.running = self.running & ~self._last & (self.lengths < self.max_lengths) & self._goes_on(token_ids, rows)
        self._submitted(drawn_logprobs, rows)
        self._last = None


class CostAwareState(DraftRound):
    """A round under the cost-aware rule, which may also leave out a candidate that it has just seen the chances of.

    Args:
        round_: from :meth:`CostAwareRule.begin`; None on ranks that follow rank 0.
        estimator: scores the candidates.
        needs: fields of :class:`StepFeatures` that it reads.
        num_reqs: requests in the batch.
        stop_token_ids: as in :class:`RoundState`.
        agree: rank 0's [...] bool tensor on every rank.
        device: of the features.
    """

    def __init__(
        self,
        round_: CostAwareRound | None,
        estimator: Estimator,
        needs: frozenset[str],
        num_reqs: int,
        *,
        stop_token_ids: Tensor | None = None,
        agree: Callable[[Tensor], Tensor] = _identity,
        device: torch.device | str = "cpu",
    ) -> None:
        running = torch.zeros(num_reqs, dtype=torch.bool) if round_ is None else torch.from_numpy(round_.running)
        super().__init__(estimator, needs, agree(running.to(device)), stop_token_ids, agree)
        self.round = round_
        self.estimator = estimator
        self._go_on: Tensor | None = None  # [num_reqs] bool, requests that draw candidate k + 1 too

    def observe(self, features: StepFeatures, rows: Tensor | None = None) -> None:
        decision = torch.zeros(2, len(self.running), dtype=torch.bool)  # submit, go on
        if self.round is not None:
            estimate = self._score(self.estimator, features, rows)
            scores = None if estimate is None else self._per_request(estimate, rows).cpu().numpy()
            made = self.round.step(scores)
            decision = torch.from_numpy(np.stack([made.submit, made.go_on]))
        self._remember(features, rows)
        self.drawing, self._go_on = self.agree(decision.to(self.running.device))

    def append(self, token_ids: Tensor, rows: Tensor | None = None, drawn_logprobs: Tensor | None = None) -> None:
        if self._go_on is None:
            raise RuntimeError("CostAwareState.append needs one observe() before every candidate")
        self.lengths = self.lengths + self.drawing
        self.running = self._go_on & self._goes_on(token_ids, rows)
        if self.round is not None and self.stop_token_ids is not None:
            self.round.end((~self.running).cpu().numpy())
        self._submitted(drawn_logprobs, rows)
        self._go_on = None
