# SPDX-License-Identifier: Apache-2.0
"""A draft and a target as tables: for replay tests. Recording it and running a policy on it share no code with replay.

Greedy decoding of a fixed text. The draft's state is a function of the prefix: one state per place of the text, and
after a candidate that the target would reject at place r, one per (r, candidates drawn since).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from vllm_specdecpp.data.shard_file import Shard, outcomes
from vllm_specdecpp.decision.features import encode_scalars
from vllm_specdecpp.head.model import AcceptanceHead
from vllm_specdecpp.training.replay.chains import Chains, chains_of_shard

HIDDEN = 8
SCALARS = ("top1_prob", "entropy", "margin")


class Process:
    """One prompt's text of ``num_tokens`` tokens.

    Args:
        match: chance that the draft's candidate is the target's token.
    """

    def __init__(self, num_tokens: int, match: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.num_tokens = num_tokens
        # Informative, but not perfectly: a high confidence makes a match more likely.
        confidence = torch.rand(num_tokens, generator=generator) ** (1 / match - 1)  # mean: match
        self.matches = (torch.rand(num_tokens, generator=generator) < confidence).tolist()
        self._confidence = confidence
        self._seed = seed

    def step(self, start: int, k: int) -> dict[str, Any]:
        """Features of the pass that yields candidate k (from 0) of a round that starts at place ``start``."""
        wrong = next((place for place in range(start, start + k) if not self.matches[place]), None)
        here = start + k if wrong is None else None
        key = self._seed * 1_000_003 + (start + k if wrong is None else 10_000_000 + wrong * 1000 + start + k - wrong)
        generator = torch.Generator().manual_seed(key)
        noise = torch.rand(2, generator=generator).tolist()
        top1 = float(self._confidence[here]) if here is not None else noise[0]
        hidden = torch.randn(HIDDEN, generator=generator)
        hidden[0] = top1 * 4 - 2
        return {
            "hidden_states": hidden, "top1_prob": top1, "entropy": (1 - top1) * (1 + noise[1]),
            "margin": 5 * top1 + noise[1], "token_ids": key % 1000,
        }  # fmt: skip


def record(
    processes: Sequence[Process], num_candidates: int, *, sets: Sequence[str] = ("a",), empty_rounds: bool = True
) -> SimpleNamespace:
    """What an engine with a fixed candidate length would record, one prompt a process, as a shard's tensors.

    Args:
        sets: the prompts take turns in being of them.
        empty_rounds: whether to keep rounds without candidates (a text's last token); shard files never have them.
    """
    columns: dict[str, list[Any]] = {name: [] for name in ("hidden_states", "token_ids", *SCALARS)}
    rounds: dict[str, list[int]] = {"num_accepted": [], "prompt_index": [], "emitted": []}
    starts = [0]
    for prompt, process in enumerate(processes):
        place = 0
        while place < process.num_tokens:
            length = min(num_candidates, process.num_tokens - place - 1)
            for k in range(length):
                for name, value in process.step(place, k).items():
                    columns[name].append(value)
            accepted = 0
            while accepted < length and process.matches[place + accepted]:
                accepted += 1
            if length or empty_rounds:
                starts.append(starts[-1] + length)
                rounds["num_accepted"].append(accepted)
                rounds["prompt_index"].append(prompt)
                rounds["emitted"].append(place + 1)  # the prefill's token came first
            place += accepted + 1
    return SimpleNamespace(
        hidden_states=torch.stack(columns["hidden_states"]),
        token_ids=torch.tensor(columns["token_ids"], dtype=torch.int32),
        **{name: torch.tensor(columns[name]) for name in SCALARS},
        round_starts=torch.tensor(starts),
        num_accepted=torch.tensor(rounds["num_accepted"], dtype=torch.int32),
        prompt_index=torch.tensor(rounds["prompt_index"], dtype=torch.int32),
        emitted=torch.tensor(rounds["emitted"], dtype=torch.int32),
        prompts=[{"id": f"p{i}", "set": sets[i % len(sets)]} for i in range(len(processes))],
    )


def as_shard(recorded: SimpleNamespace, prefix: str = "") -> Shard:
    """What :func:`record` gave (without empty rounds) as a shard to write; ``prefix`` goes before the prompt ids."""
    return Shard(
        **{name: getattr(recorded, name) for name in ("hidden_states", "token_ids", "round_starts", "num_accepted",
                                                      "prompt_index", "emitted", *SCALARS)},
        outcome=outcomes(recorded.num_accepted, recorded.round_starts),
        soft_label=torch.full_like(recorded.top1_prob, torch.nan),
        temperature=torch.zeros(len(recorded.num_accepted)),
        prompts=[{"id": prefix + p["id"], "set": p["set"]} for p in recorded.prompts],
    )  # fmt: skip


def chains_of(
    shard: Any, num_candidates: int, head: AcceptanceHead | None = None, chosen: Sequence[bool] | None = None
) -> Chains:
    """The shard's chains; ``num_candidates`` is what it was recorded with."""
    return chains_of_shard(shard, chosen or [True] * len(shard.prompts), head, num_candidates)


@dataclass
class Totals:
    """What a run of one prompt came to."""

    tokens: int = 0
    rounds: int = 0
    candidates: int = 0
    accepted: int = 0


def run_policy(process: Process, length_at: Callable[[int, int], int]) -> Totals:
    """Decode the text with a policy, round by round.

    Args:
        length_at: (place, upper bound) → candidate length of the round that starts there.
    """
    totals = Totals()
    place = 0
    while place < process.num_tokens:
        length = length_at(place, process.num_tokens - place - 1)
        accepted = 0
        while accepted < length and process.matches[place + accepted]:
            accepted += 1
        totals.tokens += accepted + 1
        totals.rounds += 1
        totals.candidates += length
        totals.accepted += accepted
        place += accepted + 1
    return totals


def rule_length(
    process: Process, rule: str, threshold: float, max_length: int, head: AcceptanceHead | None = None
) -> Callable[[int, int], int]:
    """The paper's loop for one sequence, as a scalar program: for :func:`run_policy`."""

    def estimate(place: int, k: int) -> Tensor:
        """Of the candidate that the rule knows of at the pass that yields candidate k (from 0)."""
        step = process.step(place, k)
        if rule == "confidence":
            return torch.tensor(step["top1_prob"])
        if rule == "entropy":
            return torch.exp(-torch.tensor(step["entropy"]))
        assert head is not None
        scalars = None
        if head.features:
            scalars = encode_scalars({name: torch.tensor([step[name]]) for name in SCALARS}, head.features)
        with torch.no_grad():
            return head.probability(step["hidden_states"][None], scalars, k + 1 - head.lag)[0]

    def length(place: int, bound: int) -> int:
        survival = torch.tensor(1.0)
        lag = head.lag if head is not None else 0
        for k in range(min(bound, max_length)):
            if k >= lag:
                survival = survival * estimate(place, k)
            if bool(1 - survival > threshold):
                return k + 1
        return min(bound, max_length)

    return length
