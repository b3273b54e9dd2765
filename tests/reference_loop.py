# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding as plainly as it can be written: Hugging Face models, batch 1, greedy. The tests' oracle.

Written from the paper (arXiv:2405.19715), sharing no code with ``vllm_specdecpp``. Facts of vLLM that it mirrors:

* The prefill step emits one token before anything is drafted, so round 1 starts from prompt + 1 token.
* ``Scheduler.schedule`` caps a step's positions at ``max_model_len - 1``: with L known tokens a round submits at most
  ``max_model_len - 1 - L`` candidates. It does not look at ``max_tokens``: output is cut after the verification.
* A round emits accepted + 1 tokens, so a request's candidates can be capped at ``max_tokens - emitted - 1`` at no loss.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import DynamicCache, PreTrainedModel


@dataclass(frozen=True)
class Step:
    """What a model says after a prefix."""

    hidden: torch.Tensor  # [hidden_size] after the final norm
    logits: torch.Tensor  # [vocab_size] float32

    @property
    def token(self) -> int:
        return int(self.logits.argmax())

    def gap(self, token: int) -> float:
        """How far ``token``'s logit lies below the largest one."""
        return float(self.logits.max() - self.logits[token])


class GreedyModel:
    """A Hugging Face causal LM at batch 1 that remembers the prefixes it has seen."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        self._cache = DynamicCache()
        self._cached: list[int] = []  # the tokens in the KV cache
        self._memo: dict[tuple[int, ...], Step] = {}

    @torch.inference_mode()
    def steps(self, tokens: Sequence[int], num: int = 1) -> list[Step]:
        """The steps after the last ``num`` prefixes of ``tokens``, shortest first, in one forward pass."""
        tokens = list(tokens)
        keys = [tuple(tokens[: len(tokens) - num + 1 + i]) for i in range(num)]
        if not all(key in self._memo for key in keys):
            common = 0
            for mine, wanted in zip(self._cached, tokens[: len(tokens) - num], strict=False):
                if mine != wanted:
                    break
                common += 1
            if stale := len(self._cached) - common:
                self._cache.crop(-stale)
            ids = torch.tensor([tokens[common:]])
            hidden = self.model.model(input_ids=ids, past_key_values=self._cache, use_cache=True).last_hidden_state
            self._cached = tokens
            logits = self.model.lm_head(hidden[0, -num:]).float()
            for key, h, row in zip(keys, hidden[0, -num:], logits, strict=True):
                self._memo[key] = Step(h, row)
        return [self._memo[key] for key in keys]


@dataclass(frozen=True)
class Rule:
    """When a draft ends. ``threshold`` is h: stop once the estimated P(some candidate rejected) exceeds it."""

    name: str  # fixed | threshold | confidence | entropy
    threshold: float = 1.0
    head: Callable[[torch.Tensor], float] | None = None  # hidden state [hidden_size] → P(accept)
    max_length: int = 20
    min_length: int = 1
    eos_ids: frozenset[int] = frozenset()

    def estimate(self, step: Step, num_drawn: int) -> float:
        """P(accept): of the previous candidate for the head (its lag), of the one about to be drawn otherwise."""
        if self.name == "threshold":
            assert self.head is not None
            return self.head(step.hidden) if num_drawn else 1.0
        probs = step.logits.softmax(-1)
        if self.name == "confidence":
            return float(probs.max())
        if self.name == "entropy":
            return float(torch.exp((probs * step.logits.log_softmax(-1)).sum()))
        return 1.0


@dataclass(frozen=True)
class Round:
    """One drafting phase and its verification."""

    candidates: list[int]
    accepted: int
    next_token: int  # recovered or bonus


def draft_round(draft: GreedyModel, prefix: Sequence[int], rule: Rule, cap: int | None = None) -> list[int]:
    """The candidate tokens of one round; ``cap`` is the room left for them."""
    limit = rule.max_length if cap is None else min(rule.max_length, cap)
    candidates: list[int] = []
    survival = 1.0
    while len(candidates) < limit:
        (step,) = draft.steps([*prefix, *candidates])
        survival *= rule.estimate(step, len(candidates))
        candidates.append(step.token)
        if step.token in rule.eos_ids:
            break
        if len(candidates) >= rule.min_length and 1.0 - survival > rule.threshold:
            break
    return candidates


def verify(target: GreedyModel, prefix: Sequence[int], candidates: list[int]) -> Round:
    """Greedy verification: accept while the target agrees; its own token comes next."""
    steps = target.steps([*prefix, *candidates], len(candidates) + 1)
    accepted = 0
    while accepted < len(candidates) and steps[accepted].token == candidates[accepted]:
        accepted += 1
    return Round(candidates, accepted, steps[accepted].token)


def generate(
    target: GreedyModel, draft: GreedyModel, prompt: Sequence[int], rule: Rule, *,
    max_tokens: int, max_model_len: int, stop_ids: frozenset[int] = frozenset(),
) -> tuple[list[Round], list[int]]:  # fmt: skip
    """The rounds of one request, and its output tokens."""
    output = [target.steps(prompt)[0].token]
    rounds: list[Round] = []
    while len(output) < max_tokens and len(prompt) + len(output) < max_model_len and output[-1] not in stop_ids:
        prefix = [*prompt, *output]
        cap = min(max_model_len - 1 - len(prefix), max_tokens - len(output) - 1)
        rounds.append(verify(target, prefix, draft_round(draft, prefix, rule, cap)))
        for token in [*rounds[-1].candidates[: rounds[-1].accepted], rounds[-1].next_token]:
            output.append(token)
            if token in stop_ids or len(output) == max_tokens:
                break
    return rounds, output


def answer(target: GreedyModel, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """The first ``max_tokens`` greedy tokens without speculation, whatever they are."""
    output: list[int] = []
    while len(output) < max_tokens:
        output.append(target.steps([*prompt, *output])[0].token)
    return output


def load_head(folder: str | Path) -> Callable[[torch.Tensor], float]:
    """The head's P(accept) as a plain function: residual blocks x + SiLU(Wx + b), then two logits, class 1 = accept."""
    num_layers = json.loads((Path(folder) / "config.json").read_text())["num_layers"]
    w = {key: value.float() for key, value in load_file(Path(folder) / "model.safetensors").items()}

    def probability(hidden: torch.Tensor) -> float:
        x = hidden.float()
        for i in range(num_layers):
            x = x + torch.nn.functional.silu(w[f"model.{i}.linear.weight"] @ x + w[f"model.{i}.linear.bias"])
        return float((w[f"model.{num_layers}.weight"] @ x + w[f"model.{num_layers}.bias"]).softmax(-1)[1])

    return probability
