# SPDX-License-Identifier: Apache-2.0
"""Samples rows without a candidate as vLLM does without speculation (vLLM 0.32 and 0.33, see ``docs/upstream``).

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
        batch = runner.input_batch
        if spec_decode_metadata is not None and any(spec_decode_metadata.num_draft_tokens):
            output = original(logits, spec_decode_metadata)
        else:
            batch.update_async_output_token_ids()
            # With speculation the thinking budget counts one row a request for a bonus token alone.
            output = runner.sampler(
                logits=logits, sampling_metadata=batch.sampling_metadata, predict_bonus_token=True
            )  # fmt: skip
        _unforce(batch.thinking_budget_state_holder, runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0])
        return output

    setattr(runner, _METHOD, sample)


def process_plainly(runner: Any) -> None:
    """Give the runner the logits processors that vLLM leaves out with speculation: ``min_p`` and ``logit_bias``
    (``vllm.v1.sample.logits_processor.build_logitsprocs``).

    Requests that ask for them have no candidate, and the sampler of bonus tokens applies all processors, one row a
    request.
    """
    from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS, LogitsProcessors

    made = (kind(runner.vllm_config, runner.device, runner.sampler.pin_memory) for kind in BUILTIN_LOGITS_PROCESSORS)
    runner.input_batch.logitsprocs = LogitsProcessors(made)


def _unforce(holder: Any, thrown_away: Any) -> None:
    """Let the end of a request's thinking be forced in its next step, where this step's token is thrown away.

    After a chunk of a prompt vLLM would take the bonus token that it forced for emitted, and not force another
    (``ThinkingBudgetStateHolder``, None without a reasoning parser).
    """
    for row in thrown_away if holder is not None else ():
        if (state := holder._state.get(int(row))) is not None:
            state["bonus_token_forced"] = False
