# SPDX-License-Identifier: Apache-2.0
"""One drafting phase of a batch: survival, lengths, and who goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vllm_specdecpp.decision.features import SCALAR_FEATURES, StepFeatures
from vllm_specdecpp.decision.rules import StopRule


def _identity(decision: Tensor) -> Tensor:
    return decision


class RoundState:
    """What a round knows of each request.

    Per step: :meth:`observe` the pass that yields candidate k's distribution, draw, :meth:`append`. ``observe`` decides
    whether k is the last candidate, and has only the prefix and Y_1..Y_{k-1} to decide on; ``append`` submits every
    candidate that was drawn. So the rule cannot see a token that it decides about (lossless by signature).
    A stop token ends a request's round after it was submitted.

    Args:
        rule: the stop rule.
        max_lengths: [num_reqs] int64, upper bound on the candidate length; 0 drafts nothing for the request.
        min_length: the rule may not stop a request below this many candidates.
        stop_token_ids: [num_stop_tokens], or [num_reqs, num_stop_tokens] padded with -1; tokens that end a draft.
        agree: maps the stop decision [num_reqs] bool to one that is the same on every rank.

    Attributes:
        survival: [num_reqs] float32, estimated P(all candidates scored so far are accepted); 1 at the start.
        lengths: [num_reqs] int64, candidates submitted.
        running: [num_reqs] bool, requests that draw another candidate.
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
        self.rule = rule
        self.max_lengths = max_lengths.long()
        self.min_length = min_length
        self.stop_token_ids = None if stop_token_ids is None else stop_token_ids.to(max_lengths.device)
        self.agree = agree
        self.survival = torch.ones_like(max_lengths, dtype=torch.float32)
        self.lengths = torch.zeros_like(self.max_lengths)
        self.running = self.max_lengths > 0
        self._num_drawn = 0
        self._last: Tensor | None = None  # [num_reqs] bool, whether the next candidate is the request's last
        # Only a lagged estimator reads the pass before.
        lagged = rule.estimator is not None and rule.estimator.lag > 0
        self._kept = [name for name in SCALAR_FEATURES if lagged and name in rule.needs]
        self._previous: dict[str, Tensor] = {}  # name -> [num_reqs], of the pass that yielded the last candidate
        self._current: dict[str, Tensor] = {}  # name -> [num_reqs], of the pass observed last

    def observe(self, features: StepFeatures, rows: Tensor | None = None) -> None:
        """Take in the pass that yields the next candidate's distribution, before that candidate is drawn.

        Args:
            features: of all requests, or of ``rows`` only.
            rows: [num_rows] int64 indices of the requests that ``features`` describes; must cover the running ones.
        """
        estimator = self.rule.estimator
        # A lagged estimator scores the token before: at the first step a verified one, whose acceptance is certain.
        if estimator is not None and not (estimator.lag and self._num_drawn == 0):
            if self._kept:
                index = slice(None) if rows is None else rows
                # [num_rows] each
                previous: dict[str, Any] = {name: column[index] for name, column in self._previous.items()}
                features = replace(features, previous=StepFeatures(**previous))
            # No lag: the candidate about to be drawn. Lag 1: the one drawn last.
            estimate = estimator(features, self._num_drawn + 1 - estimator.lag).float()
            # A broken estimate ends the draft, not the server.
            estimate = torch.nan_to_num(estimate, nan=0.0).clamp(0, 1)
            scores = torch.ones_like(self.survival)  # [num_reqs]
            scores[slice(None) if rows is None else rows] = estimate
            self.survival = torch.where(self.running, self.survival * scores, self.survival)
        self._current = {}
        for name in self._kept:
            # Nobody can know the draw yet: append() brings it.
            if name != "drawn_logprob" and (column := getattr(features, name)) is not None:
                self._current[name] = self._per_request(column, rows)
        stop = self.rule.should_stop(self.survival, self._num_drawn)  # [num_reqs]
        self._last = self.agree(stop & (self._num_drawn + 1 >= self.min_length))

    def append(self, token_ids: Tensor, rows: Tensor | None = None, drawn_logprobs: Tensor | None = None) -> None:
        """Submit the drawn candidate of every running request, then end those that are through.

        Args:
            token_ids: [num_reqs] the drawn tokens, or [num_rows] those of ``rows``; ignored for requests not running.
            rows: [num_rows] int64 indices, as in :meth:`observe`.
            drawn_logprobs: [num_reqs], or [num_rows], log-probabilities of the drawn tokens at temperature 1; wanted if
                the rule needs ``drawn_logprob``.

        Raises:
            RuntimeError: :meth:`observe` was not called for this candidate.
        """
        if self._last is None:
            raise RuntimeError("RoundState.append needs one observe() before every candidate")
        self.lengths = self.lengths + self.running
        go_on = self.running & ~self._last & (self.lengths < self.max_lengths)  # [num_reqs]
        if self.stop_token_ids is not None:
            index = slice(None) if rows is None else rows
            stop_token_ids = self.stop_token_ids[index] if self.stop_token_ids.dim() == 2 else self.stop_token_ids[None]
            go_on[index] &= (token_ids[:, None] != stop_token_ids).all(dim=1)  # [num_rows]
        self.running = go_on
        self._previous = self._current
        if drawn_logprobs is not None and "drawn_logprob" in self._kept:
            self._previous["drawn_logprob"] = self._per_request(drawn_logprobs, rows)
        self._num_drawn += 1
        self._last = None

    def any_running(self) -> bool:
        """Whether some request still drafts. Waits for the device."""
        return bool(self.running.any())

    def _per_request(self, values: Tensor, rows: Tensor | None) -> Tensor:
        """``values`` [num_rows] of ``rows`` as [num_reqs] float32; NaN, which no running request reads, elsewhere."""
        if rows is None:
            return values.float()
        out = torch.full_like(self.survival, torch.nan)
        out[rows] = values.float()
        return out
