# SPDX-License-Identifier: Apache-2.0
"""What the cost-aware tail reads besides the round's own state, and the one copy that brings it to the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

HORIZON = 6
"""Candidates looked ahead: as many as a step of the verification's cost is wide on the machines measured."""
MIN_SLOPE = 0.1


@dataclass(frozen=True)
class CostAwareParams:
    """Views of one packed buffer, so that :meth:`load` is one copy, and a captured graph finds them where they were.

    "By position" is indexed by a candidate's 1-based position in the round; 0 stands for "nothing scored yet".
    """

    limits: Tensor
    """[max_reqs] int32, upper bounds on the candidate lengths."""
    base: Tensor
    """[1] int32, tokens that are verified beside drafted candidates: one of each request, drafting or not, and free
    runs; the padding of a captured batch does not count."""
    price: Tensor
    """[1] float32, tokens that a second must bring; 0: every request drafts to its limit and submits all."""
    slopes: Tensor
    """[3] float32: of the candidate's own acceptance in its score's log-odds, of the next one's, and of what the next
    one's log-odds are expected to be."""
    this: Tensor
    """[num_positions] float32, intercept of the candidate's own acceptance, by position."""
    next: Tensor
    """[num_positions] float32, intercept of the next candidate's acceptance, by the scored one's position."""
    drift: Tensor
    """[num_positions] float32, intercept of the log-odds expected of the next candidate's score, likewise."""
    means: Tensor
    """[num_positions] float32, mean acceptance, by position."""
    step_seconds: Tensor
    """[max_reqs + 1] float32, of a draft step, by requests that draft."""
    verify_seconds: Tensor
    """[max_tokens + 1] float32, of a verification, by tokens; beyond its end the last slope goes on."""
    levels: Tensor
    """[max_reqs] float32, what each request's level adds to a score's log-odds as to the candidates after it."""
    first_seconds: Tensor
    """[max_reqs + 1] float32, of the first draft pass, by requests that draft; ``device_runs`` reads it, and what
    follows."""
    run_odds: Tensor
    """[1 + num_positions] float32: slope of a free run's acceptance, then the intercept, by position."""
    run_shifts: Tensor
    """[max_reqs] float32, what each request's own runs add to these log-odds."""
    bucket_of: np.ndarray
    """[num_positions + 1] int64: the bucket whose intercepts and mean a position has."""
    packed: Tensor
    """[size] float32, all of the above but ``bucket_of``: what rank 0 hands to the others."""

    @classmethod
    def allocate(
        cls, max_reqs: int, max_length: int, max_tokens: int, bucket_of: Sequence[int], device: torch.device | str
    ) -> CostAwareParams:
        """Parameters for batches of up to ``max_reqs`` requests; :meth:`load` fills them.

        Args:
            max_reqs: in a batch.
            max_length: K.
            max_tokens: the verification's cost table has ``max_tokens + 1`` entries.
            bucket_of: bucket of position 0, 1, 2, ...; the last one stands for all beyond.
            device: of the tail.

        Raises:
            ValueError: a size below 1.
        """
        for name, size in (("max_reqs", max_reqs), ("max_length", max_length), ("max_tokens", max_tokens)):
            if size < 1:
                raise ValueError(f"specdecpp: CostAwareParams: {name}={size} must be 1 or more")
        num_positions = max_length + HORIZON + 2
        buckets = np.asarray(bucket_of)[np.minimum(np.arange(num_positions + 1), len(bucket_of) - 1)]
        sizes = {
            "limits": max_reqs, "base": 1, "price": 1, "slopes": 3, "this": num_positions, "next": num_positions,
            "drift": num_positions, "means": num_positions, "step_seconds": max_reqs + 1,
            "verify_seconds": max_tokens + 1, "levels": max_reqs, "first_seconds": max_reqs + 1,
            "run_odds": 1 + num_positions, "run_shifts": max_reqs,
        }  # fmt: skip
        packed = torch.zeros(sum(sizes.values()), device=device)
        parts = dict(zip(sizes, packed.split(list(sizes.values())), strict=True))
        views = {name: part.view(torch.int32) if name in _WHOLE else part for name, part in parts.items()}
        return cls(**views, bucket_of=buckets, packed=packed)

    def load(
        self, *, limits: Any, price: float, this: Any, next: Any, means: Any, step_seconds: Any, verify_seconds: Any,
        free_rows: int = 0, levels: Any = (), first_seconds: Any = (), runs: Any = None, run_shifts: Any = (),
    ) -> None:  # fmt: skip
        """Bring a round's parameters to the device, in stream order, without waiting for it.

        Call it once a round, before the first step and outside of captured graphs. The copy of the round before may
        still be on its way.

        Args:
            limits: [num_reqs] whole numbers, for every request in the batch.
            price: as the attribute.
            this: [2 + num_buckets] slope, common intercept and the buckets' own of the candidate's acceptance.
            next: [2 + num_buckets] the same of the next candidate's.
            means: [num_buckets] mean acceptance.
            step_seconds: [max_reqs + 1 or more].
            verify_seconds: [max_tokens + 1].
            free_rows: candidates of free runs, of all requests together.
            levels: [num_reqs], or empty: as the attribute.
            first_seconds: [max_reqs + 1 or more], or empty.
            runs: [2 + num_buckets] as ``this``, of a free run's candidates; None: there are none.
            run_shifts: [num_reqs], or empty: as the attribute.

        Raises:
            ValueError: an array of another length.
        """
        limits = np.asarray(limits, dtype=np.int32)
        this, next, means = np.asarray(this), np.asarray(next), np.asarray(means)
        max_reqs, num_reqs, num_buckets = self.limits.numel(), len(limits), int(self.bucket_of[-1]) + 1
        for name, found, least in (
            ("limits", max_reqs, num_reqs), ("this", len(this), 2 + num_buckets), ("next", len(next), 2 + num_buckets),
            ("means", len(means), num_buckets), ("step_seconds", len(step_seconds), max_reqs + 1),
        ):  # fmt: skip
            if found < least:
                raise ValueError(f"specdecpp: CostAwareParams.load: {name} has room for {found}, must have for {least}")
        if len(verify_seconds) != self.verify_seconds.numel():
            raise ValueError(
                f"specdecpp: CostAwareParams.load: verify_seconds has {len(verify_seconds)} entries, must have "
                f"{self.verify_seconds.numel()}; allocate with max_tokens={len(verify_seconds) - 1}"
            )
        fade = max(float(this[0]), MIN_SLOPE)
        # Pinned anew each time: torch hands the memory out again only once this copy is through.
        host = torch.empty(self.packed.shape, pin_memory=True) if self.packed.is_cuda else self.packed
        values, end = host.numpy(), 0

        def part(size: int) -> np.ndarray:
            nonlocal end
            end += size
            return values[end - size : end]

        whole = part(max_reqs + 1).view(np.int32)
        whole[:num_reqs], whole[num_reqs:max_reqs], whole[max_reqs] = limits, 0, num_reqs + free_rows
        part(4)[:] = price, this[0], next[0], next[0] / fade
        theirs, num_positions = slice(2, 2 + num_buckets), len(self.bucket_of) - 1
        by_bucket = np.array((this[1] + this[theirs], next[1] + next[theirs], means[:num_buckets]))
        own, after, mean = by_bucket[:, self.bucket_of]  # [num_positions + 1] each
        part(4 * num_positions).reshape(4, -1)[:] = own[:-1], after[:-1], (after[:-1] - own[1:]) / fade, mean[:-1]
        part(max_reqs + 1)[:] = step_seconds[: max_reqs + 1]
        part(len(verify_seconds))[:] = verify_seconds
        _fill(part(max_reqs), levels)
        _fill(part(max_reqs + 1), first_seconds[: max_reqs + 1])
        if runs is None:
            values[end:] = 0.0
        else:
            part(1 + num_positions)[:] = runs[0], *(runs[1] + np.asarray(runs)[theirs])[self.bucket_of[:-1]]
            _fill(part(max_reqs), run_shifts)
        if host is not self.packed:
            self.packed.copy_(host, non_blocking=True)

    def tensors(self) -> dict[str, Tensor]:
        """Name to view, of those that the tail reads."""
        others = ("first_seconds", "run_odds", "run_shifts", "bucket_of", "packed")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in others}


_WHOLE = ("limits", "base")


def _fill(part: np.ndarray, values: Any) -> None:
    part[: len(values)], part[len(values) :] = values, 0.0
