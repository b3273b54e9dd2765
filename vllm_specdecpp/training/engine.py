# SPDX-License-Identifier: Apache-2.0
"""The engines that commands start."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm_specdecpp.training.options import EngineOptions

if TYPE_CHECKING:
    from vllm import LLM

    from vllm_specdecpp.costs.model import Points


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """In here an environment variable has this value; the processes of an engine that starts in here keep it."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        os.environ.update({} if before is None else {name: before})


def start_engine(target: str, speculative_config: Mapping[str, Any], options: EngineOptions, **more: Any) -> LLM:
    """A vLLM engine of a pair.

    Args:
        target: a folder or a hub id.
        speculative_config: beside the method.
        options: of the command.
        more: further arguments of vLLM's ``LLM``.

    Raises:
        ValueError: one line: the engine did not start.
    """
    from vllm import LLM

    try:
        return LLM(
            model=target,
            speculative_config={"method": "specdecpp", **speculative_config},
            kv_cache_memory_bytes=None if options.kv_cache_mib is None else options.kv_cache_mib << 20,
            enforce_eager=options.eager,
            tensor_parallel_size=options.tensor_parallel_size,
            enable_prefix_caching=False,
            **more,
        )
    except RuntimeError as error:  # the engine's own process has said more above
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"specdecpp: the engine did not start ({lines[-1]})") from error


def costs_of(llm: LLM) -> Points:
    """What passes cost, by an engine whose rule is ``cost_aware``."""
    found = llm.collective_rpc("specdecpp_stats")[0]["cost_aware"]["costs"]
    return {name: {int(width): seconds for width, seconds in curve.items()} for name, curve in found.items()}
