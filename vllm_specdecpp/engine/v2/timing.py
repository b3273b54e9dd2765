# SPDX-License-Identifier: Apache-2.0
"""Starts the cost-aware rule on Model Runner V2: costs from the last start's file, else both models are timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from vllm_specdecpp.config import SpecDecPPConfig
from vllm_specdecpp.costs import timing as costs
from vllm_specdecpp.costs.file import CostFile
from vllm_specdecpp.costs.model import Points
from vllm_specdecpp.decision.cost_aware.tail import CostAwareTail
from vllm_specdecpp.engine.shared import cost_file
from vllm_specdecpp.engine.v2.cost_aware import DeviceCostAware

Agree = Callable[[torch.Tensor], torch.Tensor]
_STEPS = 4
"""Further passes of a captured round whose mean is taken for one."""


def start(
    speculator: Any, tail: CostAwareTail, config: SpecDecPPConfig, agree: Agree
) -> DeviceCostAware:
    """The rule's host side; every rank must call it.

    Args:
        speculator: ``SpecDecPPSpeculator``, its models loaded, its graphs captured.
        tail: decides on the device.
        config: our options.
        agree: rank 0's tensor on every rank.
    """

    def told(values: torch.Tensor) -> torch.Tensor:
        """Rank 0's values, of a tensor on the host; not every backend can send bools."""
        dtype = torch.uint8 if values.dtype == torch.bool else values.dtype
        return agree(values.to(speculator.device, dtype)).to(values.device, values.dtype)

    file = _file(speculator)
    rule, measured = cost_file.start_rule(
        file, lambda: measure(speculator, told), told, speculator.scheduler_config, speculator.num_speculative_steps,
        lag=tail.estimator.lag, adapt=config.online_calibration, scores=config.head or tail.estimator.name,
    )  # fmt: skip
    return DeviceCostAware(rule, tail, file, agree, speculator.device, measured)


def _file(speculator: Any) -> CostFile:
    """Times of this runner are not those of Model Runner V1: other kernels, other graphs, other scheduling."""
    mode, is_async = speculator.how_rounds_run()[0], speculator.scheduler_config.async_scheduling
    lora = speculator.vllm_config.lora_config
    ours = {"model_runner": f"V2/{mode}", "async_scheduling": str(is_async)}
    if lora is not None:
        ours["lora"] = f"{lora.max_loras} of rank {lora.max_lora_rank}"
    return cost_file.cost_file(speculator.vllm_config, speculator.device, **ours)


def measure(speculator: Any, agree: Agree) -> Points:
    """Time both models as they will run; see :func:`vllm_specdecpp.costs.timing.measure`."""
    passes = V2Passes(speculator)
    with passes.adapters():
        points = costs.measure(passes, speculator.scheduler_config, speculator.num_speculative_steps, agree)
    if speculator.graphs is not None:
        # Beyond the largest captured batch rounds run eagerly.
        largest = speculator.graphs.sizes[-1]
        for name, captured in _captured(speculator, passes, agree).items():
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

    def synchronize(self) -> None:
        if self._speculator.device.type == "cuda":
            torch.cuda.synchronize(self._speculator.device)


def _captured(speculator: Any, passes: V2Passes, agree: Agree) -> Points:
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
    table = agree(torch.tensor([short, steps], dtype=torch.float64)).tolist()
    first, step = (dict(zip(captured.sizes, row, strict=True)) for row in table)
    return {"first": first, "step": step}
