# SPDX-License-Identifier: Apache-2.0
"""Logits of all kinds, and the comparison of logits_summary with decision/features.features_from_logits."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from vllm_specdecpp.decision.features import features_from_logits
from vllm_specdecpp.kernels.logits_summary import make_partials

RTOL, ATOL = 2e-5, 2e-6  # float32 sums of some thousand terms, in another order


@dataclass(frozen=True)
class Case:
    """What the logits look like."""

    num_reqs: int
    vocab_size: int
    dtype: str = "float32"
    scale: float = 3.0
    holes: float = 0.0
    """Share of entries that are -inf."""
    gap: int = 0
    """Entries between rows that are not theirs: NaN."""

    def __str__(self) -> str:
        odd = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return ",".join(odd)


CASES = [
    Case(1, 1),
    Case(2, 2, gap=1),
    Case(3, 17, gap=3),
    Case(1, 4095),
    Case(2, 4096, "bfloat16"),
    Case(2, 4097, "float16", gap=5),
    Case(3, 9001, "bfloat16", gap=7),  # ties
    Case(2, 12289, scale=30.0),
    Case(2, 8200, scale=0.001),
    Case(4, 8200, holes=0.7),
    Case(2, 5000, holes=0.9999),  # parts of nothing but -inf
    Case(2, 20011, "float16", scale=10.0, holes=0.2),
    Case(3, 151_936, "bfloat16"),  # Qwen's
]


def outputs(num_reqs: int, vocab_size: int) -> dict[str, Tensor]:
    """Outputs filled with what must be overwritten, and scratch with room for one request more."""
    names = ("top1_prob", "entropy", "margin")
    out = {name: torch.full((num_reqs,), -7.0) for name in names}
    out["argmax"] = torch.full((num_reqs,), -7)
    out["partials"] = make_partials(num_reqs + 1, vocab_size, "cpu").fill_(torch.nan)
    return out


def make_logits(case: Case, seed: int) -> Tensor:
    """[num_reqs, vocab_size], rows of a wider buffer."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    buffer = torch.full((case.num_reqs, case.vocab_size + case.gap), torch.nan, dtype=dtype)
    values = torch.randn(case.num_reqs, case.vocab_size, generator=generator) * case.scale + 20
    values[torch.rand(values.shape, generator=generator) < case.holes] = -torch.inf
    last = torch.randint(0, case.vocab_size, (case.num_reqs,), generator=generator)
    values[torch.arange(case.num_reqs), last] = 21.0  # some entry is no hole
    buffer[:, : case.vocab_size] = values.to(dtype)
    return buffer[:, : case.vocab_size]


def check(launch: Any, case: Case, seeds: int = 3) -> None:
    """All outputs against the decision core's; then rows that are broken."""
    for seed in range(seeds):
        logits = make_logits(case, seed)
        _compare(launch, logits, f"{case} seed {seed}")
    for broken in (torch.nan, torch.inf):
        logits = make_logits(case, 9)
        logits[-1, case.vocab_size // 2] = broken
        _compare(launch, logits, f"{case} with a {broken}")
    logits = make_logits(case, 10)
    logits[-1, 0] = logits[-1, -1] = 200.0
    _compare(launch, logits, f"{case} with a tie")
    logits[0] = -torch.inf
    _compare(launch, logits, f"{case} with a row of -inf")
    logits[0] = torch.nan
    _compare(launch, logits, f"{case} with a row of NaN")


def _compare(launch: Any, logits: Tensor, where: str) -> None:
    out = outputs(*logits.shape)
    launch(logits, **out)
    wanted = features_from_logits(logits)
    assert wanted.top1_prob is not None
    sound = ~torch.isnan(wanted.top1_prob)
    for name in ("top1_prob", "entropy", "margin"):
        found, told = out[name], getattr(wanted, name)
        assert bool(found[~sound].isnan().all()), f"{where}: {name}"
        close = torch.isclose(found[sound], told[sound], rtol=RTOL, atol=ATOL)
        assert bool(close.all()), f"{where}: {name}: {found} {told}"
    assert out["argmax"][sound].tolist() == logits.float().argmax(dim=-1)[sound].tolist(), where
    assert bool(((out["argmax"] >= 0) & (out["argmax"] < logits.shape[1])).all()), where
