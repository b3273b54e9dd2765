# SPDX-License-Identifier: Apache-2.0
"""What is kept of one draft step, and how a head reads it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

SCALAR_FEATURES = ("top1_prob", "entropy", "margin")
"""The fields of :class:`StepFeatures` with one number a request, which a head may read besides the hidden state."""

_LOG_ODDS, _LOG_ENTROPY, _MARGIN = 12.0, 12.0, 50.0
"""Where the encodings saturate: float32 tells probabilities apart up to log-odds of about 16."""


@dataclass(frozen=True)
class StepFeatures:
    """The pass that yields candidate k's distribution; it has read the prefix and Y_1..Y_{k-1}, never Y_k."""

    hidden_states: Tensor | None = None
    """[num_reqs, hidden_size] the draft's last hidden state, after the final norm."""

    top1_prob: Tensor | None = None
    """[num_reqs] float32, the largest probability of the draft's distribution at temperature 1."""

    entropy: Tensor | None = None
    """[num_reqs] float32, entropy of that distribution in nats."""

    margin: Tensor | None = None
    """[num_reqs] float32, the largest logit minus the second largest; inf if there is no other."""

    def select(self, rows: Tensor) -> StepFeatures:
        """These features of some requests: ``rows`` is a mask [num_reqs] bool, or indices [num_rows] int64."""
        columns: list[Tensor | None] = [getattr(self, field.name) for field in fields(self)]
        return StepFeatures(*(None if column is None else column[rows] for column in columns))


def features_from_logits(
    logits: Tensor, hidden_states: Tensor | None = None, *, needs: Collection[str] = SCALAR_FEATURES
) -> StepFeatures:
    """Summarise the draft's logits, in float32.

    Args:
        logits: [num_reqs, vocab_size] before temperature; -inf entries have probability 0.
        hidden_states: [num_reqs, hidden_size], kept as it is.
        needs: which of :data:`SCALAR_FEATURES` to compute, the others are None; other names are ignored.
    """
    if not any(name in needs for name in SCALAR_FEATURES):
        return StepFeatures(hidden_states)
    logits = logits.float()  # [num_reqs, vocab_size]
    margin = _margin(logits) if "margin" in needs else None  # [num_reqs]
    if "top1_prob" not in needs and "entropy" not in needs:
        return StepFeatures(hidden_states, margin=margin)
    # Relative to the largest, so that a common offset costs no float32 digits.
    logits = logits - logits.amax(dim=-1, keepdim=True)
    log_z = logits.logsumexp(dim=-1)  # [num_reqs]
    top1_prob = torch.exp(-log_z) if "top1_prob" in needs else None  # [num_reqs]
    entropy = None
    if "entropy" in needs:
        # entr(0) = 0, where p * log p would be NaN.
        entropy = torch.special.entr((logits - log_z[:, None]).exp()).sum(dim=-1)  # [num_reqs]
    return StepFeatures(hidden_states, top1_prob, entropy, margin)


def _margin(logits: Tensor) -> Tensor:
    """[num_reqs]: the largest of ``logits`` [num_reqs, vocab_size] minus the second largest."""
    if logits.shape[-1] < 2:
        return torch.full_like(logits[:, 0], torch.inf)
    largest, second = logits.topk(2, dim=-1).values.unbind(-1)
    return largest - second


def _encode_top1_prob(p: Tensor) -> tuple[Tensor, ...]:
    return p.logit().clamp(-_LOG_ODDS, _LOG_ODDS) / 4, p


def _encode_entropy(entropy: Tensor) -> tuple[Tensor, ...]:
    entropy = entropy.clamp_min(0)
    return entropy.log().clamp(-_LOG_ENTROPY, _LOG_ENTROPY) / 4, torch.exp(-entropy)


def _encode_margin(margin: Tensor) -> tuple[Tensor, ...]:
    return (torch.log1p(margin.clamp(0, _MARGIN)),)


_ENCODINGS: dict[str, tuple[int, Callable[[Tensor], tuple[Tensor, ...]]]] = {
    "top1_prob": (2, _encode_top1_prob),
    "entropy": (2, _encode_entropy),
    "margin": (1, _encode_margin),
}


def check_features(names: Sequence[str], lag: int) -> None:
    """Refuse what a head cannot read.

    Raises:
        ValueError: one line: a name that is unknown or given twice, or one beside a lag.
    """
    for name in names:
        if name not in SCALAR_FEATURES:
            raise ValueError(f"specdecpp: features={name!r} is unknown; choose among {', '.join(SCALAR_FEATURES)}")
    if len(set(names)) < len(names):
        raise ValueError(f"specdecpp: features={','.join(names)} names one twice; give each once")
    if lag and names:
        raise ValueError(
            f"specdecpp: features={','.join(names)} with lag=1: such a head reads the hidden state alone; leave one of "
            "the two out"
        )


def num_inputs(names: Sequence[str]) -> int:
    """How many columns :func:`encode_scalars` makes of ``names``."""
    return sum(_ENCODINGS[name][0] for name in names)


def encode_scalars(columns: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """What a head reads of the scalar features: bounded transforms of about unit size, the same at every call.

    Args:
        columns: name to [num_rows], of :data:`SCALAR_FEATURES`; more than ``names`` may be there.
        names: in the head's order.

    Returns:
        [num_rows, num_inputs] float32: log-odds and probability of the largest, log and exp of the entropy, log of
        1 + the margin. NaN stays NaN.

    Raises:
        ValueError: one line: an unknown name, or a column that is missing.
    """
    check_features(names, lag=0)
    encoded: list[Tensor] = []
    for name in names:
        if columns.get(name) is None:
            raise ValueError(f"specdecpp: the head reads features.{name}, but there is no such column")
        encoded += _ENCODINGS[name][1](columns[name].float())
    if not encoded:
        num_rows = next((len(column) for column in columns.values() if column is not None), 0)
        return torch.zeros(num_rows, 0)
    return torch.stack(encoded, dim=-1)  # [num_rows, num_inputs]
