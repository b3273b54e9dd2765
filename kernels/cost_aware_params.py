# SPDX-License-Identifier: Apache-2.0
"""What the cost-aware tail reads besides the round's own state, and the one copy that brings it to the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

HORIZON = 6
"""Candidates looked ahead; ``decision.cost_aware.rule`` has the reason."""


@dataclass(frozen=True)
class CostAwareParams:
    """Views of one packed buffer, so that :meth:`load` is one copy, and a captured graph finds them where they were.

    "By position" is indexed by a candidate's 1-based position in the round; 0 stands for "nothing scored yet".
    """

    limits: Tensor
    """[max_reqs] int32, upper bounds on the candidate lengths."""
    num_reqs: Tensor
    """[1] int32, requests in the batch, drafting or not; the padding of a captured batch does not count."""
    held: Tensor
    """[1] int32, 1 while the guard holds a fixed candidate length: every request drafts up to its limit."""
    probe: Tensor
    """[1] int32, 1 if the round is a probe: it submits one candidate at least."""
    rate: Tensor
    """[1] float32, rho in tokens per second."""
    explore_seconds: Tensor
    """[1] float32, in and out: time saved up for candidates that do not pay."""
    slopes: Tensor
    """[2] float32, of the candidate's own acceptance in its score's log-odds, and of the next one's."""
    this: Tensor
    """[num_positions] float32, intercept of the candidate's own acceptance, by position."""
    next: Tensor
    """[num_positions] float32, intercept of the next candidate's acceptance, by the scored one's position."""
    means: Tensor
    """[num_positions] float32, mean acceptance, by position."""
    step_seconds: Tensor
    """[max_reqs + 1] float32, of a draft step, by requests that draft."""
    verify_seconds: Tensor
    """[max_tokens + 1] float32, of a verification, by tokens; beyond its end the last slope goes on."""
    bucket_of: Tensor
    """[num_positions] int64 on the host: the bucket whose intercepts and mean a position has."""
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
            device: of the kernels.

        Raises:
            ValueError: a size below 1.
        """
        for name, size in (("max_reqs", max_reqs), ("max_length", max_length), ("max_tokens", max_tokens)):
            if size < 1:
                raise ValueError(f"specdecpp: CostAwareParams: {name}={size} must be 1 or more")
        positions = torch.arange(max_length + HORIZON + 2).clamp(max=len(bucket_of) - 1)
        num_positions = len(positions)
        sizes = {
            "limits": max_reqs, "num_reqs": 1, "held": 1, "probe": 1, "rate": 1, "explore_seconds": 1, "slopes": 2,
            "this": num_positions, "next": num_positions, "means": num_positions, "step_seconds": max_reqs + 1,
            "verify_seconds": max_tokens + 1,
        }  # fmt: skip
        packed = torch.zeros(sum(sizes.values()), device=device)
        views: dict[str, Tensor] = {}
        for name, part in zip(sizes, packed.split(list(sizes.values())), strict=True):
            views[name] = part.view(torch.int32) if name in _WHOLE else part
        return cls(**views, bucket_of=torch.as_tensor(bucket_of)[positions], packed=packed)

    def load(
        self, *, limits: Any, held: bool, probe: bool, rate: float, explore_seconds: float, this: Any, next: Any,
        means: Any, step_seconds: Any, verify_seconds: Any,
    ) -> None:  # fmt: skip
        """Bring a round's parameters to the device, in stream order, without waiting for it.

        Call it once a round, before the first step and outside of captured graphs. The copy of the round before may
        still be on its way.

        Args:
            limits: [num_reqs] whole numbers, for every request in the batch.
            held, probe, rate, explore_seconds: as the attributes.
            this: [2 + num_buckets] slope, common intercept and the buckets' own of the candidate's acceptance.
            next: [2 + num_buckets] the same of the next candidate's.
            means: [num_buckets] mean acceptance.
            step_seconds: [max_reqs + 1 or more].
            verify_seconds: [max_tokens + 1].

        Raises:
            ValueError: an array of another length.
        """
        num_reqs = len(limits)
        values = {"this": this, "next": next, "means": means, "step": step_seconds, "verify": verify_seconds}
        of = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in values.items()}
        num_buckets = int(self.bucket_of.max()) + 1
        for name, found, least in (
            ("limits", self.limits.numel(), num_reqs), ("this", len(of["this"]), 2 + num_buckets),
            ("next", len(of["next"]), 2 + num_buckets), ("means", len(of["means"]), num_buckets),
            ("step_seconds", len(of["step"]), self.step_seconds.numel()),
        ):  # fmt: skip
            if found < least:
                raise ValueError(f"specdecpp: CostAwareParams.load: {name} has room for {found}, must have for {least}")
        if len(of["verify"]) != self.verify_seconds.numel():
            raise ValueError(
                f"specdecpp: CostAwareParams.load: verify_seconds has {len(of['verify'])} entries, must have "
                f"{self.verify_seconds.numel()}; allocate with max_tokens={len(of['verify']) - 1}"
            )
        ints = torch.zeros(self.limits.numel() + 3, dtype=torch.int32)
        ints[:num_reqs] = torch.as_tensor(limits)
        ints[-3:] = torch.tensor([num_reqs, held, probe], dtype=torch.int32)
        floats = [torch.tensor([rate, explore_seconds, of["this"][0], of["next"][0]], dtype=torch.float64)]
        floats += [of[name][1] + of[name][2:][self.bucket_of] for name in ("this", "next")]
        floats += [of["means"][self.bucket_of], of["step"][: self.step_seconds.numel()], of["verify"]]
        host = torch.cat([ints.view(torch.float32), torch.cat(floats).float()])
        # Pinned anew each time: torch hands the memory out again only once this copy is through.
        self.packed.copy_(host.pin_memory() if self.packed.is_cuda else host, non_blocking=True)

    def tensors(self) -> dict[str, Tensor]:
        """Name to view, of those on the device."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("bucket_of", "packed")}


_WHOLE = ("limits", "num_reqs", "held", "probe")
