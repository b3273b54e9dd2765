# SPDX-License-Identifier: Apache-2.0
"""What our Worker classes add to vLLM's: the proposer, and remote calls to read and steer it.

The remote calls are reached with ``llm.collective_rpc("specdecpp_stats")`` and the like.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from vllm_specdecpp.config import SpecDecPPConfig
from vllm_specdecpp.engine.options import ADDITIONAL_CONFIG_KEY

if TYPE_CHECKING:
    from vllm_specdecpp.engine.v1 import SpecDecPPProposer

logger = init_logger("vllm.specdecpp")


class SpecDecPPWorkerMixin:
    """Goes before a vLLM Worker in the bases (``vllm.v1.worker.gpu_worker.Worker``)."""

    vllm_config: Any
    device: Any
    model_runner: Any

    def init_device(self) -> None:
        """Replace the drafter after vLLM has built the model runner and before it loads any weights."""
        super().init_device()  # type: ignore[misc]
        from vllm_specdecpp.engine.v1 import SpecDecPPProposer

        config = SpecDecPPConfig.from_additional_config(self.vllm_config.additional_config[ADDITIONAL_CONFIG_KEY])
        runner = self.model_runner
        if self.device.type == "cpu":
            from vllm_specdecpp.engine import cpu_sampler

            if cpu_sampler.apply():
                logger.info("specdecpp: mended vLLM's CPU rejection sampler for temperature > 0")
        runner.drafter = SpecDecPPProposer(self.vllm_config, self.device, runner, config)
        # Lengths are clamped per request, so one long request need not stop drafting for the whole batch.
        runner.effective_drafter_max_model_len += runner.num_spec_tokens

    def compile_or_warm_up_model(self) -> Any:
        """Warm up as vLLM does, then let the proposer time the draft model."""
        times = super().compile_or_warm_up_model()  # type: ignore[misc]
        self._proposer.measure_widths()
        return times

    @property
    def _proposer(self) -> SpecDecPPProposer:
        return self.model_runner.drafter

    def specdecpp_stats(self, reset: bool = False) -> dict[str, Any]:
        """Counters since start-up or the last reset; see :class:`vllm_specdecpp.engine.metrics.RoundLog`."""
        return self._proposer.log.stats(reset=reset)

    def specdecpp_rounds(self, clear: bool = False) -> list[dict[str, Any]]:
        """The last ``trace_rounds`` verified rounds, oldest first."""
        return self._proposer.log.rounds(clear=clear)

    def specdecpp_configure(self, **changes: Any) -> dict[str, Any]:
        """Change the rule while the engine runs.

        Args:
            changes: any of ``rule``, ``threshold``, ``num_speculative_tokens`` (at most the start-up value),
                ``min_speculative_tokens``, ``trace_rounds``.

        Returns:
            The configuration now in force.

        Raises:
            ValueError: a bad value; nothing has changed then.
        """
        return self._proposer.reconfigure(changes).to_additional_config()
