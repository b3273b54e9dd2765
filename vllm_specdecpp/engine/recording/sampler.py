# SPDX-License-Identifier: Apache-2.0
"""vLLM's rejection sampler, which also keeps each candidate's acceptance probability. Only while recording."""

from __future__ import annotations

import torch
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import RejectionSampler, apply_sampling_constraints
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_specdecpp.engine.v1.own_noise import OwnNoise


class _Recording(RejectionSampler):
    """Same tokens and random numbers as ``vllm.v1.sample.rejection_sampler.RejectionSampler``.

    p and q are those that the sampler compares: p after penalties, temperature, top-k and top-p; q with the request's
    temperature, or 1 for a candidate that was drawn greedily.
    """

    _draft_probs: torch.Tensor | None = None  # [num_tokens, vocab_size] during forward
    _accept_probs: list[torch.Tensor] | None = None

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,  # [num_tokens, vocab_size]
        logits: torch.Tensor,  # [num_tokens + batch_size, vocab_size]
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        """As the base class, which calls :meth:`apply_logits_processors` for the candidates' logits."""
        self._draft_probs, self._accept_probs = draft_probs, None
        try:
            return super().forward(metadata, draft_probs, logits, sampling_metadata)
        finally:
            self._draft_probs = None

    def apply_logits_processors(
        self, logits: torch.Tensor, sampling_metadata: SamplingMetadata, metadata: SpecDecodeMetadata
    ) -> torch.Tensor:
        """As the base class: [num_tokens, vocab_size]; keeps min(1, p/q) of each candidate."""
        logits = super().apply_logits_processors(logits, sampling_metadata, metadata)
        if not sampling_metadata.all_greedy:
            # The constraints are applied in place, and the sampler applies them to `logits` itself right after this.
            constrained = apply_sampling_constraints(logits.clone(), metadata.cu_num_draft_tokens, sampling_metadata)
            accept_probs = acceptance(constrained, self._draft_probs, metadata.draft_token_ids)
            self._accept_probs = list(accept_probs.split(metadata.num_draft_tokens))
        return logits

    def take(self) -> list[torch.Tensor] | None:
        """min(1, p/q) of what was verified last: one [num_candidates] float32 a row of the batch; then forgets it.

        None if every request was greedy, or nothing was verified.
        """
        taken, self._accept_probs = self._accept_probs, None
        return taken


class RecordingRejectionSampler(OwnNoise, _Recording):
    """Our rejection sampler, which keeps p before a request with a seed has drawn from it."""


def acceptance(
    target_logits: torch.Tensor,  # [num_tokens, vocab_size]
    draft_probs: torch.Tensor | None,  # [num_tokens, vocab_size]
    token_ids: torch.Tensor,  # [num_tokens]
) -> torch.Tensor:
    """min(1, p/q) of each candidate, [num_tokens] float32; q = 1 without ``draft_probs``, and q = 0 gives 0."""
    index = token_ids.long()[:, None]
    p = target_logits.softmax(dim=-1, dtype=torch.float32).gather(1, index).squeeze(1)  # [num_tokens]
    if draft_probs is None:
        return p
    q = draft_probs.gather(1, index).squeeze(1).float()  # [num_tokens]
    return torch.where(q > 0, p / q, 0.0).clamp(max=1)
