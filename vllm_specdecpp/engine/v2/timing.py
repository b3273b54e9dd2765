# SPDX-License-Identifier: Apache-2.0
"""Times single passes of both models, and captured draft rounds, on Model Runner V2."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from vllm_specdecpp.costs import timing as costs
from vllm_specdecpp.costs.model import Points
from vllm_specdecpp.costs.widths import Rows

_STEPS = 4
"""Further passes of a captured round whose mean is taken for one."""


def measure(speculator: Any) -> Points:
    """Time both models as they will run; see :func:`vllm_specdecpp.costs.timing.measure`.

    Args:
        speculator: ``SpecDecPPSpeculator``, its models loaded, its graphs captured.
    """
    passes = V2Passes(speculator)
    with passes.adapters():
        points = costs.measure(
            passes,
            speculator.scheduler_config,
            speculator.num_speculative_steps,
            speculator.agree,
            speculator.seconds_so_far(),
        )
    if speculator.graphs is not None:
        # Beyond the largest captured batch rounds run eagerly.
        largest = speculator.graphs.sizes[-1]
        for name, captured in _captured(speculator, passes).items():
            points[name] = captured | {n: seconds for n, seconds in points[name].items() if n > largest}
    return points


class V2Passes:
    """Runs one pass of a given width and waits for the device (:class:`vllm_specdecpp.costs.timing.Passes`).

    The draft's are without attention and KV; the target's is vLLM's own dummy run, with its graphs. Where the engine
    takes LoRA adapters, a dummy one is on every row of the target's, which needs :meth:`adapters` around it.

    Args:
        speculator: ``SpecDecPPSpeculator``, both models loaded.
    """

    target_to_draft: float | None = None

    def __init__(self, speculator: Any) -> None:
        self._speculator = speculator
        self._hidden_states: torch.Tensor | None = None

    def adapters(self) -> AbstractContextManager[None]:
        """Dummy LoRA adapters, if the engine takes any; at its end all adapters are gone, and vLLM loads anew what a
        request asks for."""
        runner = self._speculator.runner
        context: AbstractContextManager[None] = runner.maybe_setup_dummy_loras(runner.lora_config)
        return context

    @torch.inference_mode()
    def draft(self, num_rows: int) -> None:
        """The draft model's forward pass."""
        s = self._speculator
        buffers = s.input_buffers
        buffers.input_ids[:num_rows], buffers.positions[:num_rows] = 0, 0
        hidden_states = s._run_model(buffers.input_ids[:num_rows], buffers.positions[:num_rows], None, None, None)
        if self._hidden_states is None or len(self._hidden_states) < num_rows:
            self._hidden_states = hidden_states.clone()
        self.synchronize()

    @torch.inference_mode()
    def draft_logits(self, num_rows: int) -> None:
        """The draft model's lm_head."""
        if self._hidden_states is None or len(self._hidden_states) < num_rows:
            self.draft(num_rows)
        assert self._hidden_states is not None
        self._speculator.model.compute_logits(self._hidden_states[:num_rows])
        self.synchronize()

    @torch.inference_mode()
    def target(self, num_rows: int) -> None:
        """The target's forward pass and lm_head."""
        runner, rows = self._speculator.runner, np.array([num_rows], dtype=np.int32)

        def adapter(*_: Any, **__: Any) -> AbstractContextManager[None]:
            """vLLM's own would make the adapters anew in each run, and leaves out the further rows of logits."""
            context: AbstractContextManager[None] = runner.maybe_select_dummy_loras(
                runner.lora_config, rows, num_sampled_tokens=rows, num_active_loras=1
            )
            return context

        runner.speculator = None  # it would draft as well
        runner.maybe_dummy_run_with_lora = adapter
        try:
            hidden_states, _ = runner._dummy_run(num_rows, skip_eplb=True)
        finally:
            runner.speculator = self._speculator
            del runner.maybe_dummy_run_with_lora
        runner.model.compute_logits(hidden_states[:num_rows])
        self.synchronize()

    def pad(self, times: Points) -> Rows:
        """Nothing: passes run at the widths of their graphs, and the others on GPUs alone."""
        return {}

    def synchronize(self) -> None:
        if self._speculator.device.type == "cuda":
            torch.cuda.synchronize(self._speculator.device)


def _captured(speculator: Any, passes: V2Passes) -> Points:
    """First and further passes as they are replayed, by captured batch size."""
    captured = speculator.graphs
    assert captured is not None
    longest = min(1 + _STEPS, speculator.num_speculative_steps)

    def seconds(size: int, length: int) -> float:
        times = []
        for _ in range(1 + costs.REPEATS):
            speculator.prepare_round(size, length)
            passes.synchronize()
            before = time.perf_counter()
            speculator.replay_alone(size, length)
            passes.synchronize()
            times.append(time.perf_counter() - before)
        return min(times[1:])

    short = [seconds(size, 1) for size in captured.sizes]
    whole = [seconds(size, longest) for size in captured.sizes]
    # A further pass can hardly be cheaper than a twentieth of the first; noise must not make it negative.
    steps = [max((w - f) / max(longest - 1, 1), f / 20) for f, w in zip(short, whole, strict=True)]
    table = speculator.agree(torch.tensor([short, steps], dtype=torch.float64)).tolist()
    first, step = (dict(zip(captured.sizes, row, strict=True)) for row in table)
    return {"first": first, "step": step}
