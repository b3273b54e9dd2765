# SPDX-License-Identifier: Apache-2.0
"""V2's rejection sampler, which sees where drafts end, and gives the same text for the same seed.

Where a draft ended when the scheduler booked more room than was drafted:

V2 takes the token -1 for "no draft here": standard verification samples from the target at that row, block verification
ends the block before it (``vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils``). But the drafts that the sampler
sees are the target's own input ids, and -1 is no row of an embedding table. So the target reads token 0 there, and the
-1 is put in for verification alone, through the sampler's own argument for it, ``invalid_drafts``.

Requests with a seed: without speculation their token at position j is drawn from the target's law with noise that
vLLM keys by seed and position. Here each row of a round draws its token just so, and a candidate is accepted if and
only if it is that token. Lossless, for the reasons given in ``engine.v1.own_noise``.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler


class EndOfDraftSampler(RejectionSampler):
    """Rejects every draft beyond what its request submitted, and of requests with a seed all that they would not emit.

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

    def _verify(
        self,
        logits: torch.Tensor,  # [num_logits, vocab_size]
        draft_logits: torch.Tensor | None,
        draft_sampled: torch.Tensor,  # [num_logits]
        pos: torch.Tensor,  # [num_logits]
        cu_num_logits: torch.Tensor,  # [num_reqs + 1]
        idx_mapping: torch.Tensor,  # [num_reqs]
        idx_mapping_np: Any,
        expanded_idx_mapping: torch.Tensor,  # [num_logits]
        expanded_local_pos: torch.Tensor,
        seq_lens_upper_bound_np: Any,
        verify_draft_sampled: torch.Tensor,  # [num_logits] -1 where no candidate is
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        processed, sampled, num_sampled = super()._verify(
            logits, draft_logits, draft_sampled, pos, cu_num_logits, idx_mapping, idx_mapping_np,
            expanded_idx_mapping, expanded_local_pos, seq_lens_upper_bound_np, verify_draft_sampled,
        )  # fmt: skip
        states = self.sampler.sampling_states
        seeded = states.seeds_set[idx_mapping_np] & (states.temperature.np[idx_mapping_np] > 0)  # [num_reqs]
        if self.synthetic_conditional_rates is not None or not seeded.any():
            return processed, sampled, num_sampled
        drawn = gumbel_sample(
            processed, expanded_idx_mapping, states.temperature.gpu, states.seeds.gpu, pos,
            apply_temperature=False, is_drafting=False, use_fp64=self.sampler.use_fp64_gumbel,
        )  # [num_logits]  # fmt: skip
        rows = cu_num_logits[:-1, None] + torch.arange(sampled.shape[1], device=sampled.device)
        last = cu_num_logits[1:, None] - 1  # [num_reqs, 1]
        candidates = verify_draft_sampled[torch.minimum(rows + 1, last).long()]
        drawn = drawn[torch.minimum(rows, last).long()]  # [num_reqs, num_speculative_steps + 1]
        accepted = ((drawn == candidates) & (rows < last)).cumprod(dim=1).sum(dim=1)
        is_seeded = async_tensor_h2d(seeded, device=sampled.device)
        sampled = torch.where(is_seeded[:, None], drawn, sampled)
        return processed, sampled, torch.where(is_seeded, (accepted + 1).to(num_sampled.dtype), num_sampled)


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
