# SPDX-License-Identifier: Apache-2.0
"""What our Worker classes add to vLLM's: the proposer or speculator, and remote calls to read and steer it.

The remote calls are reached with ``llm.collective_rpc("specdecpp_stats")`` and the like.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from vllm_specdecpp.config import SpecDecPPConfig
from vllm_specdecpp.engine import gpu_defaults
from vllm_specdecpp.engine.front_end import ADDITIONAL_CONFIG_KEY
from vllm_specdecpp.engine.shared.requests import why_plain

if TYPE_CHECKING:
    from vllm_specdecpp.engine.v1.late_drafts import LateDrafts
    from vllm_specdecpp.engine.v1.proposer import SpecDecPPProposer
    from vllm_specdecpp.engine.v2.speculator import SpecDecPPSpeculator

logger = init_logger("vllm.specdecpp")


class SpecDecPPWorkerMixin:
    """Goes before a vLLM Worker in the bases (``vllm.v1.worker.gpu_worker.Worker``)."""

    vllm_config: Any
    device: Any
    model_runner: Any
    _head_aside: list[Any] = []  # its tensors, on the host, while the engine sleeps
    _late_drafts: LateDrafts | None = None

    def init_device(self) -> None:
        """Replace the drafter after vLLM has built the model runner and before it loads any weights."""
        super().init_device()  # type: ignore[misc]
        config = SpecDecPPConfig.from_additional_config(self.vllm_config.additional_config[ADDITIONAL_CONFIG_KEY])
        if self.vllm_config.use_v2_model_runner:
            self._install_speculator(config)
        else:
            self._install_proposer(config)

    def _install_speculator(self, config: SpecDecPPConfig) -> None:
        """Model Runner V2."""
        from vllm_specdecpp.engine.v2.free_runs import hold_tokens
        from vllm_specdecpp.engine.v2.runs_only import RunsOnlySpeculator
        from vllm_specdecpp.engine.v2.speculator import SpecDecPPSpeculator

        self.model_runner.speculator = None  # its buffers can be large
        runner = self.model_runner
        kind = SpecDecPPSpeculator if config.drafts else RunsOnlySpeculator
        runner.speculator = kind(self.vllm_config, self.device, config, runner)
        if runner.speculator.run_sources:
            hold_tokens(runner.req_states, config.suffix_cache == "engine", gpu_defaults.tokens_room())
        if self.vllm_config.lora_config is not None:
            from vllm_specdecpp.engine.v2 import lora

            lora.count_rows(runner)

    def _install_proposer(self, config: SpecDecPPConfig) -> None:
        """Model Runner V1."""
        from vllm_specdecpp.engine.v1 import late_drafts, plain_steps
        from vllm_specdecpp.engine.v1.own_noise import OwnNoise
        from vllm_specdecpp.engine.v1.proposer import SpecDecPPProposer
        from vllm_specdecpp.engine.v1.runs_only import RunsOnlyProposer

        runner = self.model_runner
        plain_steps.sample_plainly(runner)
        runner.rejection_sampler = OwnNoise(runner.sampler, self.vllm_config.speculative_config, self.device)
        plain_steps.process_plainly(runner)
        if self.device.type == "cpu":
            from vllm_specdecpp.engine.v1 import cpu_sampler

            if cpu_sampler.apply():
                logger.info("specdecpp: mended vLLM's CPU rejection sampler for temperature > 0")
        kind = SpecDecPPProposer if config.drafts else RunsOnlyProposer
        runner.drafter = kind(self.vllm_config, self.device, runner, config)
        # Lengths are clamped per request: vLLM need not stop drafting for the whole batch, near neither model's end.
        runner.effective_drafter_max_model_len = runner.max_model_len + runner.num_spec_tokens
        if late_drafts.can_wait(self.vllm_config):
            self._late_drafts = late_drafts.LateDrafts(runner)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load as vLLM does; on Model Runner V2 then tell the rejection sampler where drafts end."""
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        if self._speculator is not None:
            from vllm_specdecpp.engine.v2.sampler import end_of_draft_sampler

            runner = self.model_runner
            runner.rejection_sampler = end_of_draft_sampler(runner.rejection_sampler, self._speculator.submitted)

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the target as vLLM does; Model Runner V2 does not keep what the speculator must know of a request."""
        log = self._drafter.log
        for request in scheduler_output.scheduled_new_reqs:
            log.arrived(request.req_id, why_plain(request.sampling_params))
        if self._speculator is not None:
            self._speculator.requests.update(scheduler_output)
        else:
            log.finished(scheduler_output.finished_req_ids)
        return super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]

    def take_draft_token_ids(self) -> Any:
        """What the scheduler is told; on Model Runner V2 each request's own candidates, not the upper bound of them."""
        if self._late_drafts is not None:
            self._late_drafts.run()
        taken = super().take_draft_token_ids()  # type: ignore[misc]
        return taken if taken is None or self._speculator is None else self._speculator.ragged(taken)

    def compile_or_warm_up_model(self) -> Any:
        """Warm up as vLLM does, then give the rule its costs: the last run's, else timed now."""
        speculator = self._speculator
        if speculator is not None:
            speculator.warm()  # first: at its end vLLM begins to watch for what is compiled in service
        times = super().compile_or_warm_up_model()  # type: ignore[misc]
        if speculator is not None:
            speculator.log.stats(reset=True)  # vLLM's warm-up drafts, too
            speculator.log.rounds(clear=True)
            logger.info("specdecpp: draft rounds run %s: %s", *speculator.how_rounds_run())
            logger.info("specdecpp: verifications run %s", speculator.how_verified)
        self._drafter.start_cost_aware()
        self._drafter.take_metrics()  # vLLM's warm-up is nobody's
        return times

    def sleep(self, level: int = 1) -> None:
        """As vLLM; at level 2, which discards all weights, the head is put aside: vLLM knows nothing of it."""
        head = self._drafter.head
        if level == 2 and head is not None:
            self._head_aside = [t.detach().to("cpu", copy=True) for t in (*head.parameters(), *head.buffers())]
        super().sleep(level)  # type: ignore[misc]

    def wake_up(self, tags: list[str] | None = None) -> None:
        """As vLLM; the head is there again with the weights, where captured graphs look for it."""
        super().wake_up(tags)  # type: ignore[misc]
        head = self._drafter.head
        if self._head_aside and head is not None and (tags is None or "weights" in tags):
            for tensor, kept in zip((*head.parameters(), *head.buffers()), self._head_aside, strict=True):
                tensor.data.copy_(kept)
            self._head_aside = []

    def shutdown(self) -> None:
        """Write what was learnt and not written yet, drop captured rounds, then shut down as vLLM does.

        NCCL ends a communicator only when no graph that uses it is left.
        """
        runner = getattr(self, "model_runner", None)
        drafter: Any
        try:
            for drafter in (getattr(runner, "drafter", None), getattr(runner, "speculator", None)):
                if getattr(drafter, "cost_aware", None) is not None:
                    drafter.cost_aware.save()
                if getattr(drafter, "graphs", None) is not None:
                    drafter.drop_graphs("the engine has shut down")
        finally:
            del runner, drafter
            super().shutdown()  # type: ignore[misc]

    def _start_recording(self) -> None:
        """Record rounds from now on, on rank 0 alone: every rank sees the same numbers."""
        from vllm.distributed import get_tp_group

        proposer, runner = self._proposer, self.model_runner
        if get_tp_group().rank_in_group != 0 or proposer.recorder is not None:
            return
        from vllm_specdecpp.engine.recording.recorder import RoundRecorder
        from vllm_specdecpp.engine.recording.sampler import RecordingRejectionSampler

        sampler = RecordingRejectionSampler(runner.sampler, self.vllm_config.speculative_config, self.device)
        proposer.recorder = RoundRecorder(runner.requests, sampler.take)
        runner.rejection_sampler = sampler

    @property
    def _proposer(self) -> SpecDecPPProposer:
        if self._speculator is not None:
            raise ValueError("specdecpp: recording rounds needs Model Runner V1; start with VLLM_USE_V2_MODEL_RUNNER=0")
        return self.model_runner.drafter

    @property
    def _speculator(self) -> SpecDecPPSpeculator | None:
        """Model Runner V2's, or None on V1."""
        return self.model_runner.speculator if self.vllm_config.use_v2_model_runner else None

    @property
    def _drafter(self) -> SpecDecPPProposer | SpecDecPPSpeculator:
        return self._speculator or self._proposer

    def specdecpp_stats(self, reset: bool = False) -> dict[str, Any]:
        """See ``engine.shared.drafter.Drafter.stats``."""
        return self._drafter.stats(reset)

    def specdecpp_take_metrics(self) -> dict[str, Any] | None:
        """See ``engine.shared.drafter.Drafter.take_metrics``."""
        return self._drafter.take_metrics()

    def specdecpp_rounds(self, clear: bool = False) -> list[dict[str, Any]]:
        """The last ``trace_rounds`` verified rounds, oldest first."""
        return self._drafter.log.rounds(clear=clear)

    def specdecpp_flush_records(self, path: str | None, prompts: dict[str, dict[str, str]]) -> dict[str, Any]:
        """Write what was recorded since the last call; the first call starts recording.

        Arguments, result and errors are those of ``engine.recording.recorder.RoundRecorder.flush``; the result
        is empty on all ranks but the first.
        """
        self._start_recording()
        recorder = self._proposer.recorder
        return {} if recorder is None else recorder.flush(path, prompts)

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
        return self._drafter.reconfigure(changes).to_additional_config()
