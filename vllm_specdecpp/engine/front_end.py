# SPDX-License-Identifier: Apache-2.0
"""What is wrapped in vLLM's front end once an engine with specdecpp was asked for: requests on their way in, metrics on
their way out."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

from vllm_specdecpp.engine.metrics import EngineMetrics
from vllm_specdecpp.request_options import RequestOptions

ADDITIONAL_CONFIG_KEY = "specdecpp"


def check_requests() -> None:
    """Wrap vLLM's check of a request's parameters: a bad switch is refused with HTTP 400, before it is scheduled; what
    vLLM serves without speculation only is served without candidates."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError  # the server answers it with 400, a plain ValueError with 500
    from vllm.v1.engine.input_processor import InputProcessor

    if getattr(InputProcessor, "_specdecpp_installed", False):
        return
    original = InputProcessor._validate_params

    @functools.wraps(original)
    def validate(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        if ADDITIONAL_CONFIG_KEY not in (self.vllm_config.additional_config or {}):
            return original(self, params, *args, **kwargs)
        try:
            RequestOptions.from_extra_args(getattr(params, "extra_args", None))
        except ValueError as error:
            raise VLLMValidationError(str(error)) from None
        if isinstance(params, SamplingParams) and not params.trace_decode_token_ids:
            self.speculative_config = None  # read only to refuse min_p and logit_bias: these have no candidates
        try:
            return original(self, params, *args, **kwargs)
        finally:
            self.speculative_config = self.vllm_config.speculative_config

    InputProcessor._validate_params = validate
    InputProcessor._specdecpp_installed = True


_TAKE = "specdecpp_take_metrics"
SCRAPE_SECONDS = 1.0
"""How long a scrape waits for the engine, which may be in a long step; what it tells later is in the next one."""


def show_metrics() -> None:
    """Wrap what shows vLLM's metrics: ours are taken from the engine first, and logged beside vLLM's line."""
    from vllm.entrypoints.serve.instrumentator import metrics as route
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine

    if getattr(AsyncLLM, "_specdecpp_installed", False):
        return
    log_async, attach = AsyncLLM.do_log_stats, route.attach_router
    log, get = LLMEngine.do_log_stats, LLMEngine.get_metrics

    @functools.wraps(log_async)
    async def do_log_stats_async(self: Any) -> None:
        await _take_async(self)
        await log_async(self)
        if (ours := _metrics_of(self)) is not None and self._client_count == 1:  # vLLM logs nothing either with more
            ours.log()

    @functools.wraps(log)
    def do_log_stats(self: Any) -> None:
        _take(self)
        log(self)
        if (ours := _metrics_of(self)) is not None:
            ours.log()

    @functools.wraps(get)
    def get_metrics(self: Any) -> Any:
        _take(self)
        return get(self)

    @functools.wraps(attach)
    def attach_router(app: Any) -> None:
        attach(app)
        app.add_middleware(_TakesFirst)

    AsyncLLM.do_log_stats, LLMEngine.do_log_stats, LLMEngine.get_metrics = do_log_stats_async, do_log_stats, get_metrics
    route.attach_router = attach_router
    AsyncLLM._specdecpp_installed = True


class _TakesFirst:
    """ASGI middleware: takes the engine's numbers before ``/metrics`` is answered."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"].rstrip("/").endswith("/metrics"):
            engine = getattr(scope["app"].state, "engine_client", None)
            if hasattr(engine, "logger_manager"):
                await _take_async(engine)
        await self._app(scope, receive, send)


def _metrics_of(engine: Any) -> EngineMetrics | None:
    """Of vLLM's ``AsyncLLM`` or ``LLMEngine``; None if it serves without specdecpp, or without statistics."""
    if engine.logger_manager is None or ADDITIONAL_CONFIG_KEY not in (engine.vllm_config.additional_config or {}):
        return None
    if (found := engine.__dict__.get("_specdecpp_metrics")) is None:
        name = engine.vllm_config.model_config.served_model_name
        found = engine._specdecpp_metrics = EngineMetrics(name, engine.logger_manager.engine_indexes)
    ours: EngineMetrics = found
    return ours


def _take(engine: Any) -> None:
    """Take what is new from the engine."""
    if (ours := _metrics_of(engine)) is not None:
        ours.add([engine.collective_rpc(_TAKE)[0]])


async def _take_async(engine: Any) -> None:
    """Likewise; nothing is lost if it takes longer than one waits."""
    if (ours := _metrics_of(engine)) is None or engine.errored:
        return

    def arrived(done: asyncio.Task[Any]) -> None:
        if not done.cancelled() and done.exception() is None:
            ours.add([ranks[0] for ranks in done.result()])

    task = engine.__dict__.get("_specdecpp_task")
    if task is None or task.done():
        take = engine.engine_core.call_utility_all_async("collective_rpc", _TAKE, None, (), None)
        task = engine._specdecpp_task = asyncio.ensure_future(take)
        task.add_done_callback(arrived)
    await asyncio.wait({task}, timeout=SCRAPE_SECONDS)
