# SPDX-License-Identifier: Apache-2.0
"""Runs a vLLM engine inside the test's own process and reads its rounds."""

from __future__ import annotations

import gc
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

MAX_MODEL_LEN = 192
"""Of the tiny engines, in tokens."""
CHEAP = {"first": {1: 1e-3}, "step": {1: 1e-3}, "verify": {1: 20e-3, 64: 22e-3}}
"""Seconds of the cost-aware rule: drafting is well worth it."""
SMALL = {"max_model_len": 64, "max_num_seqs": 256, "max_num_batched_tokens": 4096}
"""Options of an engine with a small vocabulary, whose law is tested: many short answers at once."""
_kept: tuple[str, ExitStack, Any] | None = None


@contextmanager
def quick_collections() -> Iterator[None]:
    """vLLM collects garbage a dozen times in an engine's life, in all that was ever imported: half the time of a tiny
    engine. Here what is there before stays frozen, and nothing else is."""
    gc.freeze()
    with mock.patch.multiple(gc, freeze=lambda: None, unfreeze=lambda: None):
        yield


@contextmanager
def engine(model: str, speculative_config: dict[str, Any] | str | None = None, **options: Any) -> Iterator[Any]:
    """A tiny engine, shut down at the end, whatever happens: only one can live in a process."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    from vllm_specdecpp.costs import timing

    end_kept()
    arguments: dict[str, Any] = {
        "dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True, "seed": 0,
        "max_model_len": MAX_MODEL_LEN, "max_num_seqs": 4, "max_num_batched_tokens": 512,
        "enable_prefix_caching": False, "disable_log_stats": True, "num_gpu_blocks_override": 1024,
    }  # fmt: skip
    llm = None
    with quick_collections(), mock.patch.object(timing, "MOST", 0.3):  # seconds of timing, where it was a whole one
        try:
            llm = LLM(model=str(model), speculative_config=speculative_config, **{**arguments, **options})
            yield llm
        finally:
            if llm is not None:
                llm.llm_engine.engine_core.shutdown()
            del llm
            cleanup_dist_env_and_memory()
            gc.collect()


def kept(model: str, speculative_config: dict[str, Any], **options: Any) -> Any:
    """The engine of the last such call, its prefix cache and counters empty, if the arguments are the same; else a new
    one. It goes on until the next engine starts, or the module ends."""
    global _kept
    key = repr((model, speculative_config, options))
    if _kept is None or _kept[0] != key:
        with ExitStack() as stack:
            llm = stack.enter_context(engine(model, speculative_config, **options))
            _kept = key, stack.pop_all(), llm
    llm = _kept[2]
    assert llm.reset_prefix_cache()
    take_rounds(llm)
    llm.collective_rpc("specdecpp_stats", kwargs={"reset": True})
    return llm


def end_kept() -> None:
    """Shut down the engine of :func:`kept`, if there is one."""
    global _kept
    if _kept is not None:
        stack, _kept = _kept[1], None
        stack.close()


def prompts(num: int, *, seed: int = 0, shortest: int = 3, longest: int = 40, vocab: int = 512) -> list[list[int]]:
    """Random prompts of different lengths; ids below 3 are special and left out."""
    rnd = random.Random(seed)
    return [[rnd.randrange(3, vocab) for _ in range(rnd.randint(shortest, longest))] for _ in range(num)]


def generate(llm: Any, requests: Sequence[Sequence[int]], **sampling: Any) -> list[Any]:
    """vLLM's request outputs, in order; greedy unless told otherwise."""
    from vllm import SamplingParams

    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 40, "detokenize": False, **sampling})
    return llm.generate([{"prompt_token_ids": list(p)} for p in requests], params, use_tqdm=False)


def token_ids(outputs: Sequence[Any]) -> list[list[int]]:
    """The first completion of each request."""
    return [list(o.outputs[0].token_ids) for o in outputs]


def first_tokens(
    llm: Any, prompt: Sequence[int], num: int, length: int, seed: int, n: int = 1, **sampling: Any
) -> list[tuple[int, ...]]:
    """Of ``num`` independent answers, ``n`` to a request, the first ``length`` tokens; two more come after them."""
    import torch

    torch.manual_seed(seed)
    outputs = generate(llm, [prompt] * (num // n), n=n, max_tokens=length + 2, ignore_eos=True, **sampling)
    return [tuple(c.token_ids[:length]) for o in outputs for c in o.outputs]


def accepted_share(rounds: Sequence[dict[str, Any]]) -> float:
    """How many of the candidates were accepted: between 0 and 1, both branches of the rejection sampler are used."""
    return sum(r["accepted"] for r in rounds) / sum(len(r["candidates"]) for r in rounds)


def configure(llm: Any, **changes: Any) -> None:
    """Change the stop rule of a running engine."""
    llm.collective_rpc("specdecpp_configure", kwargs=changes)


def take_rounds(llm: Any) -> list[dict[str, Any]]:
    """The rounds verified since the last call."""
    return llm.collective_rpc("specdecpp_rounds", kwargs={"clear": True})[0]


def rounds_of(outputs: Sequence[Any], rounds: Sequence[dict[str, Any]]) -> list[list[tuple[list[int], int, int]]]:
    """(candidates, accepted, next token) of each request, in order; vLLM's inner request ids are "<id>-<random>"."""
    grouped: dict[str, list[tuple[list[int], int, int]]] = defaultdict(list)
    for r in rounds:
        grouped[r["request_id"].split("-")[0]].append((list(r["candidates"]), r["accepted"], r["next_token"]))
    unknown = set(grouped) - {o.request_id for o in outputs}
    assert not unknown, f"rounds of unknown requests {sorted(unknown)}"
    return [grouped[o.request_id] for o in outputs]


def runner(llm: Any) -> Any:
    """The engine's model runner."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def proposer(llm: Any) -> Any:
    """The engine's drafter."""
    return runner(llm).drafter


@contextmanager
def verified_rounds(llm: Any) -> Iterator[list[dict[str, Any]]]:
    """The rounds as vLLM's scheduler sees them, whatever the proposer says: a list that fills while requests run."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    original = scheduler.update_from_output
    rounds: list[dict[str, Any]] = []

    def record(scheduler_output: Any, runner_output: Any) -> Any:
        for request_id, index in runner_output.req_id_to_index.items():
            tokens = runner_output.sampled_token_ids[index]
            request = scheduler.requests.get(request_id)
            if tokens and request is not None and request.num_output_tokens > 0:  # not a prefill step
                candidates = scheduler_output.scheduled_spec_decode_tokens.get(request_id, [])
                rounds.append(
                    {"request_id": request_id, "candidates": list(candidates), "accepted": len(tokens) - 1,
                     "next_token": tokens[-1]}
                )  # fmt: skip
        return original(scheduler_output, runner_output)

    scheduler.update_from_output = record
    try:
        yield rounds
    finally:
        del scheduler.update_from_output


def set_costs(llm: Any, curves: dict[str, dict[int, float]]) -> Any:
    """Give the cost-aware rule these costs for good: real times teach it nothing. Returns the rule."""
    cost_aware = proposer(llm).cost_aware
    fix_costs(cost_aware, curves)
    return cost_aware.rule


def fix_costs(cost_aware: Any, curves: dict[str, dict[int, float]]) -> None:
    """As :func:`set_costs`, of the rule's host side."""
    from vllm_specdecpp.decision.cost_aware import CostModel

    model: Any = CostModel(**curves, max_reqs=64, max_tokens=512)
    model.observe_draft = model.verify.observe = lambda *args: None
    cost_aware.rule.costs, cost_aware._overheads = model, None


def forget(rule: Any) -> None:
    """Let the cost-aware rule begin as if it had never seen a round."""
    from vllm_specdecpp.decision.cost_aware import CostAwareRule

    fresh = CostAwareRule(rule.costs, rule.max_length)
    rule.admission, rule.purse, rule.acceptance = fresh.admission, fresh.purse, fresh.acceptance
