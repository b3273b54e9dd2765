# SPDX-License-Identifier: Apache-2.0
"""Samples steps without a candidate as vLLM does without speculation (vLLM 0.32 and 0.33, see ``docs/upstream``).

With speculation Model Runner V1 calls the rejection sampler in every step, also when nothing was drafted, as in a
prefill and in every round of K = 0. It then draws noise over the whole vocabulary that nothing reads (3 ms a request on
a CPU core), and where there is no Triton it ends the engine at top-k without top-p, on the maximum of no rows.
"""

from __future__ import annotations

from typing import Any

_METHOD = "_sample"


def sample_plainly(runner: Any) -> None:
    """Make the runner do so (``GPUModelRunner._sample``); a second call replaces the first.

    The tokens are those that the rejection sampler would emit, drawn from the same generators: without candidates it
    emits its bonus token, which this very sampler draws from the same rows.
    """
    runner.__dict__.pop(_METHOD, None)
    original = getattr(runner, _METHOD)

    def sample(logits: Any, spec_decode_metadata: Any) -> Any:
        nothing = spec_decode_metadata is not None and not any(spec_decode_metadata.num_draft_tokens)
        return original(logits, None if nothing else spec_decode_metadata)

    setattr(runner, _METHOD, sample)
