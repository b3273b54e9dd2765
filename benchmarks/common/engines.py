# SPDX-License-Identifier: Apache-2.0
"""Two vLLM engines side by side, each in its own process: speculation off, and speculation whose method is switched.

Only one of them works at a time; the other one waits on a socket and uses no processor time. The second engine changes
its method between two prompts without a restart: our rules through the worker's own ``specdecpp_configure``, vLLM's
``draft_model`` by giving the model runner a proposer of vLLM's own class (see ``use_native_proposer``).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from benchmarks.common.methods import NATIVE, OFF, PADDING, RUNS, Method

if TYPE_CHECKING:
    from vllm import LLM

SPEC = "spec"
"""Name of the speculating engine; the other one is ``OFF``."""

PADDING_METHOD = "_determine_batch_execution_and_padding"
"""The method of vLLM's model runner that our worker replaces (``vllm_specdecpp.engine.v1.target_widths``)."""

# vLLM's own counters: every method is counted by the same code.
COUNTERS = {
    "rounds": "vllm:spec_decode_num_drafts",
    "candidates": "vllm:spec_decode_num_draft_tokens",
    "accepted": "vllm:spec_decode_num_accepted_tokens",
}


@dataclass(frozen=True)
class EngineSettings:
    """What both engines share, and what only the speculating one has."""

    target: str
    draft: str
    head: str | None = None
    draft_sample_method: str | None = None
    num_speculative_tokens: int = 20
    batch: int = 1
    max_model_len: int = 1024
    kv_cache_bytes: int = 512 << 20
    eager: bool = False
    trace_rounds: int = 0

    def speculative_config(self, ours: bool = True, **options: Any) -> dict[str, Any]:
        """vLLM's option for the speculating engine, with our method and some of its options or with vLLM's own."""
        shared: dict[str, Any] = {"model": self.draft, "num_speculative_tokens": self.num_speculative_tokens}
        if self.draft_sample_method is not None:
            shared["draft_sample_method"] = self.draft_sample_method
        if not ours:
            return {"method": NATIVE, **shared}
        head = {} if self.head is None else {"head": self.head}
        return {"method": "specdecpp", **shared, "trace_rounds": self.trace_rounds, **head, **options}


@dataclass(frozen=True)
class Generation:
    """One timed call: token ids of each prompt, wall-clock seconds, and vLLM's counters (zero without speculation)."""

    token_ids: list[list[int]]
    seconds: float
    counters: dict[str, int] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Generated tokens of all prompts."""
        return sum(map(len, self.token_ids))


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
    use_padding(worker, False)  # verifying at a cheaper width is ours as well
    return str(DraftModelProposer.propose.__qualname__)


def restore_proposer(worker: Any) -> None:
    """Runs in the worker: put back the proposer and the padding that the engine started with."""
    if getattr(worker, "_benchmark_proposer", None) is not None:
        worker.model_runner.drafter = worker._benchmark_proposer
        worker._benchmark_proposer = None
    use_padding(worker, True)


def use_padding(worker: Any, on: bool) -> None:
    """Runs in the worker: verify at the widths that our worker measured, or at those that vLLM would use."""
    attributes = worker.model_runner.__dict__
    if not on and PADDING_METHOD in attributes:
        worker._benchmark_padding = attributes.pop(PADDING_METHOD)
    elif on and getattr(worker, "_benchmark_padding", None) is not None:
        attributes[PADDING_METHOD] = worker._benchmark_padding
        worker._benchmark_padding = None


def use_runs(worker: Any, on: bool) -> None:
    """Runs in the worker: let the cost-aware rule propose free runs, or the draft model alone."""
    from vllm_specdecpp.source_registry import make_sources

    rule = worker.model_runner.drafter.cost_aware.rule
    rule.sources = tuple(make_sources(list(rule.free_runs.models))) if on else ()


class Engines:
    """Starts the engines that the methods need: one that is off, one that speculates."""

    def __init__(self, settings: EngineSettings, methods: Sequence[Method], say: Callable[[str], None] = print):
        self.settings = settings
        self._methods = methods
        self._needs_off = any(method.name == OFF for method in methods)
        self._needs_native = any(method.name == NATIVE for method in methods)
        self._needs_rules = any(method.is_rule for method in methods)
        self._say = say
        self._llms: dict[str, LLM] = {}
        self._selected: Method | None = None

    def check(self) -> None:
        """Refuse methods that this engine cannot run, before minutes are spent on starting it.

        Raises:
            ValueError: an unknown rule, a bad option, or more candidates than ``num_speculative_tokens``.
        """
        from vllm_specdecpp.config import SpecDecPPConfig

        bound = self.settings.num_speculative_tokens
        start_up: dict[str, Any] = {"model": self.settings.draft, "num_speculative_tokens": bound}
        if self.settings.head is not None:
            start_up["head"] = self.settings.head
        for method in self._methods:
            wanted = method.fixed_k or 0
            if method.is_rule:
                changes = self._rule_arguments(method)
                SpecDecPPConfig.from_additional_config(start_up).with_changes(changes)
                wanted = changes["num_speculative_tokens"]
            if wanted > bound:
                raise ValueError(
                    f"method {method.label!r}: the engine holds {bound} candidates; raise --max-candidates"
                )

    def start(self) -> None:
        """Start what is needed; the speculating engine last, because vLLM's metrics belong to the newest engine."""
        self.check()
        if self._needs_off:
            self.start_engine(OFF, None)
        if self._needs_native or self._needs_rules:
            self.start_engine(SPEC, self.settings.speculative_config(ours=self._needs_rules))

    def start_engine(self, name: str, speculative_config: dict[str, Any] | None) -> None:
        """Start one engine, in a process of its own."""
        # A function is sent to the worker by pickle; both ends are ours.
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
        from vllm import LLM

        compiled = "eager" if self.settings.eager else "compiled: takes minutes"
        method = speculative_config["method"] if speculative_config else "speculation off"
        self._say(f"starting engine '{name}' ({method}; {compiled}) ...")
        start = time.perf_counter()
        self._llms[name] = LLM(
            model=self.settings.target,
            speculative_config=speculative_config,
            dtype="bfloat16",
            max_model_len=self.settings.max_model_len,
            max_num_seqs=self.settings.batch,
            kv_cache_memory_bytes=self.settings.kv_cache_bytes,
            enforce_eager=self.settings.eager,
            enable_prefix_caching=False,
            disable_log_stats=False,
            seed=0,
        )
        self._say(f"engine '{name}' is up after {time.perf_counter() - start:.0f} s")

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a user's message in the target's chat template."""
        tokenizer: Any = next(iter(self._llms.values())).get_tokenizer()
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        return list(tokenizer.encode(text, add_special_tokens=False))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of some token ids."""
        tokenizer: Any = next(iter(self._llms.values())).get_tokenizer()
        return str(tokenizer.decode(list(token_ids)))

    def spec_rpc(self, method: str | Callable[..., Any], **kwargs: Any) -> Any:
        """Call the speculating engine's worker; returns the first rank's answer."""
        return self.rpc(SPEC, method, **kwargs)

    def rpc(self, name: str, method: str | Callable[..., Any], **kwargs: Any) -> Any:
        """Call one engine's worker; returns the first rank's answer."""
        return self._llms[name].collective_rpc(method, kwargs=kwargs)[0]

    def select(self, method: Method) -> None:
        """Switch the speculating engine to ``method``, outside any timed section."""
        if method == self._selected or method.name == OFF:
            return
        if method.name == NATIVE:
            self.spec_rpc(use_native_proposer, num_candidates=method.fixed_k)
        else:
            self.spec_rpc(restore_proposer)
            self.spec_rpc(use_padding, on=bool(dict(method.options).get(PADDING, 1)))
            self.spec_rpc("specdecpp_configure", **self._rule_arguments(method))
            if method.name == "cost_aware":
                self.spec_rpc(use_runs, on=bool(dict(method.options).get(RUNS, 1)))
        self._selected = method

    def _rule_arguments(self, method: Method) -> dict[str, Any]:
        """Every option is sent each time, so that nothing is left over from the method before."""
        from vllm_specdecpp.rule_registry import find_rule

        arguments: dict[str, Any] = {
            "rule": method.name,
            "threshold": find_rule(method.name).threshold,
            "num_speculative_tokens": self.settings.num_speculative_tokens,
            "min_speculative_tokens": 1,
        }
        return arguments | {key: value for key, value in method.options if key not in (PADDING, RUNS)}

    def generate(
        self,
        method: Method,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        temperature: float,
        top_k: int | None = None,
        seed: int = 0,
    ) -> Generation:
        """Generate for one batch of token-id prompts with ``method``; the clock covers prefill and decoding."""
        self.select(method)
        before = self._counters() if method.name != OFF else {}
        result = self.answer(OFF if method.name == OFF else SPEC, prompts, max_tokens, temperature, top_k, seed)
        after = self._counters() if method.name != OFF else {}
        return replace(result, counters={key: after.get(key, 0) - before.get(key, 0) for key in COUNTERS})

    def answer(
        self,
        name: str,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        temperature: float,
        top_k: int | None = None,
        seed: int = 0,
    ) -> Generation:
        """Generate for one batch of token-id prompts with one engine as it is; nothing is counted."""
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k or 0,
            seed=seed if temperature > 0 else None,
        )
        inputs: Any = [{"prompt_token_ids": list(ids)} for ids in prompts]
        start = time.perf_counter()
        outputs = self._llms[name].generate(inputs, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        return Generation(
            token_ids=[list(output.outputs[0].token_ids) for output in outputs],
            seconds=seconds,
            texts=[output.outputs[0].text for output in outputs],
        )

    def _counters(self) -> dict[str, int]:
        metrics = self._llms[SPEC].get_metrics()
        values = {metric.name: int(metric.value) for metric in metrics if metric.name in COUNTERS.values()}
        return {key: values[name] for key, name in COUNTERS.items()}

    def close(self) -> None:
        """End the engines' processes."""
        for llm in self._llms.values():
            llm.llm_engine.engine_core.shutdown(timeout=20)
        self._llms.clear()
        self._selected = None
