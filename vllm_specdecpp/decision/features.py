# SPDX-License-Identifier: Apache-2.0
"""What is kept of one draft step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepFeatures:
    """The pass that yields candidate k's distribution; it has read the prefix and Y_1..Y_{k-1}, never Y_k."""

    hidden_states: Tensor | None = None
    """[num_reqs, hidden_size] the draft's last hidden state, after the final norm."""

    top1_prob: Tensor | None = None
    """[num_reqs] float32, the largest probability of the draft's distribution at temperature 1."""

    entropy: Tensor | None = None
    """[num_reqs] float32, entropy of that distribution in nats."""


def features_from_logits(
    logits: Tensor, hidden_states: Tensor | None = None, *, top1: bool = True, entropy: bool = True
) -> StepFeatures:
    """Summarise the draft's logits, in float32.

    Args:
        logits: [num_reqs, vocab_size] before temperature; -inf entries have probability 0.
        hidden_states: [num_reqs, hidden_size], kept as it is.
        top1: whether to compute ``top1_prob``; it is None otherwise.
        entropy: whether to compute ``entropy``; it is None otherwise.
    """
    if not (top1 or entropy):
        return StepFeatures(hidden_states)
    logits = logits.float()  # [num_reqs, vocab_size]
    # Relative to the largest, so that a common offset costs no float32 digits.
    logits = logits - logits.amax(dim=-1, keepdim=True)
    log_z = logits.logsumexp(dim=-1)  # [num_reqs]
    top1_prob = torch.exp(-log_z) if top1 else None  # [num_reqs]
    entropies = None
    if entropy:
        # entr(0) = 0, where p * log p would be NaN.
        entropies = torch.special.entr((logits - log_z[:, None]).exp()).sum(dim=-1)  # [num_reqs]
    return StepFeatures(hidden_states, top1_prob, entropies)
