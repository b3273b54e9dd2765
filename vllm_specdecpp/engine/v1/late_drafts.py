# SPDX-License-Identifier: Apache-2.0
"""Drafts once a step's tokens are on their way to the client (Model Runner V1).

vLLM's runner drafts before it returns what it sampled, so the first token of a request would wait for a drafting phase,
and for the draft model to read the prompt. The engine asks for the candidates after it has sent the tokens
(``EngineCore.post_step``): only then are they drafted. Model Runner V2 copies the tokens before it drafts.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm import envs


class LateDrafts:
    """Puts ``GPUModelRunner.propose_draft_token_ids`` off until :meth:`run`.

    Args:
        runner: the ``GPUModelRunner``; its state stays as the step left it until the engine has asked.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._propose = runner.propose_draft_token_ids
        self._put_off: tuple[Any, tuple[Any, ...], dict[str, Any]] | None = None
        runner.propose_draft_token_ids = self._put_off_step

    def _put_off_step(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> list[list[int]]:
        self._put_off = scheduler_output, args, kwargs
        return []

    @torch.inference_mode()
    def run(self) -> None:
        """Draft for the step that was put off, if there is one."""
        put_off, self._put_off = self._put_off, None
        if put_off is not None:
            scheduler_output, args, kwargs = put_off
            self._runner._draft_token_ids = self._propose(scheduler_output, *args, **kwargs)
            self._runner._copy_draft_token_ids_to_cpu(scheduler_output)


def can_wait(vllm_config: Any) -> bool:
    """Whether the engine asks for candidates between its steps, and nobody needs the draft model's KV before that.

    With asynchronous scheduling the next step has begun by then; a KV connector saves the KV before the step returns.
    vLLM's older Ray executor asks its workers beside their steps: one may not have come to the end of its own yet.
    """
    asks_beside = vllm_config.parallel_config.distributed_executor_backend == "ray"
    asks_beside &= not getattr(envs, "VLLM_USE_RAY_V2_EXECUTOR_BACKEND", True)  # 0.33 has no other
    is_async, connector = vllm_config.scheduler_config.async_scheduling, vllm_config.kv_transfer_config
    return not (is_async or asks_beside) and connector is None
