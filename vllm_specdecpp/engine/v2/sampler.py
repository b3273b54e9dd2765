# SPDX-License-Identifier: Apache-2.0
"""Lets V2's rejection sampler see where a draft ended when the scheduler booked more room than was drafted.

V2 takes the token -1 for "no draft here": standard verification samples from the target at that row, block verification
ends the block before it (``vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils``). But the drafts that the sampler
sees are the target's own input ids, and -1 is no row of an embedding table. So the target reads token 0 there, and the
-1 is put in for verification alone, through the sampler's own argument for it, ``invalid_drafts``.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler


class EndOfDraftSampler(RejectionSampler):
    """Rejects every draft beyond what its request submitted.

    Made by :func:`end_of_draft_sampler`, never constructed.
    """

    submitted: torch.Tensor  # [max_num_reqs] int32 by request state, candidates of the last round

    def __call__(
        self,
        logits: torch.Tensor,  # [num_logits, vocab_size]
        input_batch: Any,
        draft_logits: torch.Tensor | None = None,  # [max_num_reqs, num_speculative_steps, vocab_size]
        invalid_drafts: torch.Tensor | None = None,  # [num_logits] bool
    ) -> Any:
        # Row 0 of a request holds its last emitted token, row i its candidate i.
        beyond = input_batch.expanded_local_pos > self.submitted[input_batch.expanded_idx_mapping]
        invalid_drafts = beyond if invalid_drafts is None else invalid_drafts | beyond
        return super().__call__(logits, input_batch, draft_logits, invalid_drafts)


def end_of_draft_sampler(sampler: Any, submitted: torch.Tensor) -> EndOfDraftSampler:
    """The same sampler, the same attributes, with the end of each draft known.

    Args:
        sampler: the runner's ``rejection_sampler``.
        submitted: [max_num_reqs] int32, by request state; read at every verification.

    Raises:
        ValueError: the model brings a rejection sampler of its own.
    """
    if type(sampler) is not RejectionSampler:
        raise ValueError(
            f"specdecpp: the target model brings its own rejection sampler {type(sampler).__name__}, which is not "
            "supported on Model Runner V2; set VLLM_USE_V2_MODEL_RUNNER=0"
        )
    ours = EndOfDraftSampler.__new__(EndOfDraftSampler)
    ours.__dict__ = sampler.__dict__  # vLLM's warm-up sets attributes on it
    ours.submitted = submitted
    return ours
