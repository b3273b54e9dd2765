# SPDX-License-Identifier: Apache-2.0
"""What runs in the speculating engine's worker to switch its method between two prompts, without a restart."""

from __future__ import annotations

import copy
from typing import Any

from benchmarks.common.methods import NGRAM

PADDING, LATE = "_determine_batch_execution_and_padding", "propose_draft_token_ids"
"""Methods of vLLM's model runner that our worker replaces (``target_widths`` and ``late_drafts`` in ``engine.v1``)."""


def use_native_proposer(worker: Any, num_candidates: int) -> str:
    """Runs in the worker: draft with vLLM's own ``DraftModelProposer``, unmodified, at a fixed K.

    The new proposer shares every attribute (weights, buffers, KV groups) with the one that vLLM or our plugin set up,
    but its class is vLLM's: no method of ours is called. ``SpecDecodeBaseProposer.propose`` takes K as an argument for
    every call (vLLM's dynamic speculation uses that), so K below the start-up value needs no other change.
    """
    from vllm.v1.spec_decode.draft_model import DraftModelProposer

    class FixedK(DraftModelProposer):
        def propose(self, num_speculative_tokens: int, *args: Any, **kwargs: Any) -> Any:
            return super().propose(min(num_candidates, num_speculative_tokens), *args, **kwargs)

        def take_metrics(self) -> dict[str, Any]:
            return {"counters": [], "gauges": []}  # the engine asks for ours whoever drafts

    restore_proposer(worker)
    runner = worker.model_runner
    native = object.__new__(FixedK)
    native.__dict__ = runner.drafter.__dict__
    worker._benchmark_proposer = runner.drafter
    runner.drafter = native
    _replace(worker, False, PADDING, LATE)
    return str(DraftModelProposer.propose.__qualname__)


def use_text_proposer(worker: Any, proposer: str, options: dict[str, int]) -> str:
    """Runs in the worker: draft with vLLM's own ``ngram`` or ``suffix`` proposer; no draft model runs.

    The runner asks a proposer by ``speculative_config.method``, so it gets a copy of the configuration with that name.
    The target's KV cache stays the one of an engine with a draft model.
    """
    from vllm.v1.spec_decode.ngram_proposer import NgramProposer
    from vllm.v1.spec_decode.suffix_decoding import SuffixDecodingProposer

    restore_proposer(worker)
    runner = worker.model_runner
    config = copy.copy(runner.speculative_config)
    config.method = proposer
    config.prompt_lookup_min, config.prompt_lookup_max = options.get("min", 5), options.get("max", 5)  # vLLM's defaults
    vllm_config = copy.copy(runner.vllm_config)
    vllm_config.speculative_config = config

    ours = runner.drafter

    class FixedNgram(NgramProposer):
        def propose(self, num_speculative_tokens: int, *args: Any, **kwargs: Any) -> Any:
            return super().propose(min(options["K"], num_speculative_tokens), *args, **kwargs)

        def __getattr__(self, name: str) -> Any:
            return getattr(ours, name)  # our worker counts requests, whoever drafts

    class FixedSuffix(SuffixDecodingProposer):
        def propose(self, num_speculative_tokens: int, *args: Any, **kwargs: Any) -> Any:
            return super().propose(self.num_speculative_tokens, *args, **kwargs)

        def __getattr__(self, name: str) -> Any:
            return getattr(ours, name)

    made = (FixedNgram if proposer == NGRAM else FixedSuffix)(vllm_config)
    if proposer != NGRAM:
        made.num_speculative_tokens = min(options["K"], made.num_speculative_tokens)
    made.take_metrics = lambda: {"counters": [], "gauges": []}
    worker._benchmark_proposer, worker._benchmark_config = runner.drafter, runner.speculative_config
    runner.drafter, runner.speculative_config = made, config
    _replace(worker, False, PADDING, LATE)
    return str(type(made).__mro__[1].__qualname__)


def restore_proposer(worker: Any) -> None:
    """Runs in the worker: put back the proposer, its configuration and the methods that the engine started with."""
    if getattr(worker, "_benchmark_proposer", None) is not None:
        worker.model_runner.drafter = worker._benchmark_proposer
        worker._benchmark_proposer = None
    if getattr(worker, "_benchmark_config", None) is not None:
        worker.model_runner.speculative_config = worker._benchmark_config
        worker._benchmark_config = None
    _replace(worker, True, PADDING, LATE)


def use_padding(worker: Any, on: bool) -> None:
    """Runs in the worker: verify at the widths that our worker measured, or at those that vLLM would use."""
    _replace(worker, on, PADDING)


def _replace(worker: Any, on: bool, *methods: str) -> None:
    """Use our own methods of the runner, where it has them, or vLLM's."""
    ours, aside = worker.model_runner.__dict__, worker.__dict__.setdefault("_benchmark_methods", {})
    source, target = (aside, ours) if on else (ours, aside)
    target.update({name: source.pop(name) for name in methods if name in source})


def use_runs(worker: Any, where: int) -> None:
    """Runs in the worker: let the cost-aware rule propose free runs, or with 0 the draft model alone.

    With 2 also from other requests' outputs, which are kept while another method is measured.
    """
    from vllm_specdecpp.source_registry import make_sources

    rule = worker.model_runner.drafter.cost_aware.rule
    made = worker.__dict__.setdefault("run_sources_made", {0: ()})
    if where not in made:
        made[where] = tuple(make_sources(list(rule.free_runs.models), "engine" if where == 2 else "request"))
    rule.sources = made[where]
