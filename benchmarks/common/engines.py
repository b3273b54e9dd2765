# SPDX-License-Identifier: Apache-2.0
"""vLLM engines side by side, each in its own process: speculation off, and one a draft model whose method is switched.

Only one of them works at a time; the others wait on a socket and use no processor time. A speculating engine changes
its method between two prompts without a restart: our rules through the worker's own ``specdecpp_configure``, vLLM's
own by giving the model runner a proposer of vLLM's own class (``benchmarks.common.in_worker``).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.common.in_worker import restore_proposer, use_native_proposer, use_padding, use_runs, use_text_proposer
from benchmarks.common.methods import NATIVE, NGRAM, OFF, PADDING, RUNS, SUFFIX, Method

if TYPE_CHECKING:
    from vllm import LLM

SPEC = "spec"
"""Name of the pair's speculating engine; one with another draft has its name after an @, the other one is ``OFF``."""

# vLLM's own counters (`SpecDecodingProm`): every method is counted by the same code.
COUNTERS = {
    "rounds": "counter_spec_decode_num_drafts",
    "candidates": "counter_spec_decode_num_draft_tokens",
    "accepted": "counter_spec_decode_num_accepted_tokens",
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
    other_drafts: Mapping[str, str] = field(default_factory=dict)

    def speculative_config(self, ours: bool = True, draft: str = "") -> dict[str, Any]:
        """vLLM's option for a speculating engine, with our method or with vLLM's own."""
        model = self.other_drafts[draft] if draft else self.draft
        shared: dict[str, Any] = {"model": model, "num_speculative_tokens": self.num_speculative_tokens}
        if self.draft_sample_method is not None:
            shared["draft_sample_method"] = self.draft_sample_method
        if not ours:
            return {"method": NATIVE, **shared}
        head = {} if self.head is None else {"head": self.head}
        return {"method": "specdecpp", **shared, "trace_rounds": self.trace_rounds, **head}


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


class Engines:
    """Starts the engines that the methods need: one that is off, one that speculates."""

    def __init__(self, settings: EngineSettings, methods: Sequence[Method], say: Callable[[str], None] = print):
        self.settings = settings
        self._methods = methods
        self._needs_off = any(method.name == OFF for method in methods)
        self._say = say
        self._llms: dict[str, LLM] = {}
        self._selected: dict[str, Method] = {}

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
            if method.draft and method.draft not in self.settings.other_drafts:
                there = ", ".join(self.settings.other_drafts) or "none"
                raise ValueError(f"method {method.label!r}: there is no draft {method.draft!r}; there is {there}")
            if method.name == SUFFIX:
                from vllm.utils.import_utils import has_arctic_inference

                if not has_arctic_inference():
                    raise ValueError("method 'suffix': vLLM's needs arctic_inference; install it, or leave suffix out")
            if method.is_rule:
                changes = self._rule_arguments(method)
                SpecDecPPConfig.from_additional_config(start_up).with_changes(changes)
                wanted = changes["num_speculative_tokens"]
            if wanted > bound:
                raise ValueError(f"method {method.label!r}: the engine holds {bound} candidates; raise max_candidates")

    def start(self) -> None:
        """Start what is needed: an engine that is off, and one for each draft."""
        self.check()
        if self._needs_off:
            self.start_engine(OFF, None)
        for draft in dict.fromkeys(method.draft for method in self._methods if method.name != OFF):
            # vLLM's ngram and suffix run in ours as well: the engine that they need has no other place.
            ours = any(m.name != NATIVE for m in self._methods if m.name != OFF and m.draft == draft)
            self.start_engine(_engine_of(draft), self.settings.speculative_config(ours=ours, draft=draft))

    def start_engine(self, name: str, speculative_config: dict[str, Any] | None) -> None:
        """Start one engine, in a process of its own."""
        # A function is sent to the worker by pickle; both ends are ours.
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
        # The threads that numba starts for vLLM's ngram make every later pass of that worker several times slower.
        os.environ.setdefault("NUMBA_NUM_THREADS", "1")
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
        engine = _engine_of(method.draft)
        if method == self._selected.get(engine) or method.name == OFF:
            return
        options = dict(method.options)
        if method.name == NATIVE:
            self.rpc(engine, use_native_proposer, num_candidates=method.fixed_k)
        elif method.name in (NGRAM, SUFFIX):
            self.rpc(engine, use_text_proposer, proposer=method.name, options=options)
        else:
            self.rpc(engine, restore_proposer)
            self.rpc(engine, use_padding, on=bool(options.get(PADDING, 1)))
            self.rpc(engine, "specdecpp_configure", **self._rule_arguments(method))
            if method.name == "cost_aware":
                self.rpc(engine, use_runs, where=options.get(RUNS, 1))
        self._selected[engine] = method

    def _rule_arguments(self, method: Method) -> dict[str, Any]:
        """Every option is sent each time, so that nothing is left over from the method before."""
        from vllm_specdecpp.rule_registry import RULES, one_of_the_rules

        if method.name not in RULES:
            raise ValueError(f"rule={method.name!r} {one_of_the_rules()}")
        arguments: dict[str, Any] = {
            "rule": method.name,
            "threshold": RULES[method.name].threshold,
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
    ) -> Generation:
        """Generate for one batch of token-id prompts with ``method``; the clock covers prefill and decoding.

        Requests have no seed: a seeded one would draft one-hot, which most traffic does not.
        """
        from vllm import SamplingParams

        self.select(method)
        engine = OFF if method.name == OFF else _engine_of(method.draft)
        before = self._counters(engine)
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k or 0,
        )
        inputs: Any = [{"prompt_token_ids": list(ids)} for ids in prompts]
        start = time.perf_counter()
        outputs = self._llms[engine].generate(inputs, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        after = self._counters(engine)
        return Generation(
            token_ids=[list(output.outputs[0].token_ids) for output in outputs],
            seconds=seconds,
            counters={key: after.get(key, 0) - before.get(key, 0) for key in COUNTERS},
            texts=[output.outputs[0].text for output in outputs],
        )

    def _counters(self, engine: str) -> dict[str, int]:
        """Of one engine: vLLM's registry holds only those of the engine that started last."""
        if engine == OFF:
            return {}
        loggers: Any = self._llms[engine].llm_engine.logger_manager
        prom = next(x for x in loggers.stat_loggers if hasattr(x, "spec_decoding_prom")).spec_decoding_prom
        return {key: int(_value(getattr(prom, name)[0])) for key, name in COUNTERS.items()}

    def close(self) -> None:
        """End the engines' processes."""
        for llm in self._llms.values():
            llm.llm_engine.engine_core.shutdown(timeout=20)
        self._llms.clear()
        self._selected.clear()


def _engine_of(draft: str) -> str:
    return f"{SPEC}@{draft}" if draft else SPEC


def _value(counter: Any) -> float:
    """What a Prometheus counter of one engine stands at."""
    return next(float(s.value) for metric in counter.collect() for s in metric.samples if s.name.endswith("_total"))
