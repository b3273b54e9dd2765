# SPDX-License-Identifier: Apache-2.0
"""Turns ``method: specdecpp`` into vLLM's own options, in the front-end process.

The user's speculative config becomes a plain ``draft_model`` one, our options travel in
``additional_config["specdecpp"]`` and ``worker_cls`` names our Worker: all official, all carried to spawned workers.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from pydantic import ValidationError

from vllm_specdecpp.config import SpecDecPPConfig
from vllm_specdecpp.engine.hooks import require_supported
from vllm_specdecpp.request_options import RequestOptions

logger = logging.getLogger("vllm.specdecpp")

METHOD = "specdecpp"
ADDITIONAL_CONFIG_KEY = "specdecpp"

_REFUSED = {
    "parallel_drafting": "one pass proposes all candidates, so there is nothing to stop early",
    "use_local_argmax_reduction": "the stop rule needs the draft's logits",
    "use_heterogeneous_vocab": "draft and target must share a vocabulary",
    "enable_adaptive_verification": "it needs Model Runner V2",
    "disable_padded_drafter_batch": "draft models need the padded batch",
}
"""Options of vLLM's SpeculativeConfig that cannot work with specdecpp yet, with the reason."""


def _one_line(error: ValidationError) -> str:
    """The messages of a pydantic error without its multi-line frame."""
    return "; ".join(" ".join(str(e["msg"]).removeprefix("Value error, ").split()) for e in error.errors())


def _worker_cls() -> str:
    from vllm.platforms import current_platform

    module = "cpu_worker.CPUWorker" if current_platform.is_cpu() else "worker.Worker"
    return f"vllm_specdecpp.engine.{module}"


def _user_dict(args: Any) -> dict[str, Any] | None:
    """The speculative config as a dict if it asks for our method, else None."""
    raw = args.speculative_config
    if isinstance(raw, str):
        raw = {"method": raw}
    merged: dict[str, Any] = {str(k).replace("-", "_"): v for k, v in raw.items()} if isinstance(raw, Mapping) else {}
    if METHOD not in (merged.get("method"), args.spec_method):
        return None
    flags = {
        "method": ("--spec-method", args.spec_method),
        "model": ("--spec-model", args.spec_model),
        "num_speculative_tokens": ("--spec-tokens", args.spec_tokens),
    }
    for key, (flag, value) in flags.items():
        if value is None:
            continue
        if key in merged and merged[key] != value:
            raise ValueError(
                f"specdecpp: {flag} {value} and --speculative-config {key}={merged[key]!r} disagree; give one of them"
            )
        merged[key] = value
    return merged


def _check_engine_args(args: Any, user: Mapping[str, Any]) -> None:
    for key, reason in _REFUSED.items():
        if user.get(key):
            raise ValueError(f"specdecpp: {key}={user[key]} cannot be used: {reason}; leave it out")
    if args.worker_cls != "auto":
        raise ValueError(
            f"specdecpp: --worker-cls {args.worker_cls} cannot be used, specdecpp brings its own Worker; leave it out"
        )
    method = user.get("rejection_sample_method")
    if user.get("record_dir") is not None and method not in (None, "standard"):
        raise ValueError(
            f"specdecpp: rejection_sample_method={method!r} cannot be recorded: its outcomes are not those of one "
            "candidate after the other; leave it or record_dir out"
        )
    if args.async_scheduling:
        raise ValueError(
            "specdecpp: --async-scheduling books a fixed number of draft slots and cannot carry per-request lengths; "
            "leave it out"
        )
    for name in ("pipeline_parallel_size", "data_parallel_size"):
        if (value := getattr(args, name, 1)) > 1:
            raise ValueError(f"specdecpp: {name}={value} is not supported; use 1")
    if not isinstance(args.additional_config or {}, dict):
        raise ValueError(
            f"specdecpp: --additional-config must be a JSON object to carry our options, not a "
            f"{type(args.additional_config).__name__}"
        )
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        raise ValueError(
            "specdecpp: VLLM_USE_V2_MODEL_RUNNER=1 is not supported yet; unset it, and Model Runner V1 will be selected"
        )


def _select_model_runner_v1() -> None:
    from vllm.triton_utils import HAS_TRITON

    if HAS_TRITON:  # without Triton vLLM runs V1 anyway, and other engines of this process keep their choice
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # worker processes inherit it
        logger.info("specdecpp: using Model Runner V1 (VLLM_USE_V2_MODEL_RUNNER=0)")


def expand(args: Any) -> SpecDecPPConfig | None:
    """Rewrite an ``EngineArgs`` in place if it asks for specdecpp.

    Args:
        args: a ``vllm.engine.arg_utils.EngineArgs``.

    Returns:
        The checked configuration, or None if another method (or none) was asked for.

    Raises:
        ValueError: a bad option, an unsupported vLLM, an unknown pair, or a head that does not load.
    """
    user = _user_dict(args)
    if user is None:
        return None
    require_supported()
    from vllm.config.speculative import SpeculativeConfig

    if not user.get("model"):
        from vllm_specdecpp.pairs import find_pair

        pair = find_pair(args.model)
        user["model"] = pair.draft
        if pair.head is not None and user.get("rule") in (None, "threshold"):
            user.setdefault("head", pair.head)
    config, passed_on = SpecDecPPConfig.from_speculative_config(
        user, passthrough=[f.name for f in fields(SpeculativeConfig)]
    )
    _check_engine_args(args, user)
    args.speculative_config = {**passed_on, "method": "draft_model"}
    args.spec_method = args.spec_model = args.spec_tokens = None
    args.additional_config = {**(args.additional_config or {}), ADDITIONAL_CONFIG_KEY: config.to_additional_config()}
    args.worker_cls = _worker_cls()
    args.async_scheduling = False
    _select_model_runner_v1()
    return config


def _check_head(config: SpecDecPPConfig, vllm_config: Any) -> None:
    """Load the head once in the front end, so that a bad one fails here and not inside a worker."""
    if config.head is None:
        return
    from vllm_specdecpp.head import AcceptanceHead
    from vllm_specdecpp.training.provenance import model_label

    hidden_size = vllm_config.speculative_config.draft_model_config.get_hidden_size()
    AcceptanceHead.from_pretrained(
        config.head,
        revision=config.head_revision,
        expected_hidden_size=hidden_size,
        expected_draft=model_label(config.model),
    )


def _check_record_dir(config: SpecDecPPConfig, vllm_config: Any) -> None:
    """Open the folder once in the front end, so that one that cannot be recorded into fails here."""
    if config.record_dir is None:
        return
    from vllm_specdecpp.engine.record_folder import RecordFolder, server_manifest

    RecordFolder(config.record_dir, server_manifest(vllm_config)).close()
    logger.info("specdecpp: recording hidden states and token ids into %s", config.record_dir)


def _announce(config: SpecDecPPConfig) -> None:
    bound = f"threshold {config.resolved_threshold}, " if config.resolved_threshold is not None else ""
    source = f"head {config.head}" if config.head else "no head given: training-free"
    logger.info(
        "specdecpp: draft %s, rule %s (%s), %scandidate length %d to %d",
        config.model,
        config.resolved_rule,
        source,
        bound,
        config.min_speculative_tokens,
        config.num_speculative_tokens,
    )


def _wrap_create_engine_config(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = expand(self)
        if config is None:
            return original(self, *args, **kwargs)
        try:
            vllm_config = original(self, *args, **kwargs)
        except ValidationError as error:
            what = f"model={config.model!r} as draft of {self.model!r}"
            raise ValueError(f"specdecpp: {what}: {_one_line(error)}") from error
        _check_head(config, vllm_config)
        _check_record_dir(config, vllm_config)
        _check_requests_on_admission()
        _announce(config)
        return vllm_config

    return create_engine_config


def _check_requests_on_admission() -> None:
    """Wrap vLLM's check of a request's parameters: a bad switch is refused with HTTP 400, before it is scheduled."""
    from vllm.exceptions import VLLMValidationError  # the server answers it with 400, a plain ValueError with 500
    from vllm.v1.engine.input_processor import InputProcessor

    if getattr(InputProcessor, "_specdecpp_installed", False):
        return
    original = InputProcessor._validate_params

    @functools.wraps(original)
    def validate(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        if ADDITIONAL_CONFIG_KEY in (self.vllm_config.additional_config or {}):
            try:
                RequestOptions.from_extra_args(getattr(params, "extra_args", None))
            except ValueError as error:
                raise VLLMValidationError(str(error)) from None
        return original(self, params, *args, **kwargs)

    InputProcessor._validate_params = validate
    InputProcessor._specdecpp_installed = True


def _wrap_add_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        for action in parser._actions:
            if action.dest == "speculative_config":
                action.type = _bare_word(action.type)
            elif action.dest == "spec_method" and action.choices is not None and METHOD not in action.choices:
                action.choices = [*action.choices, METHOD]
        return parser

    return add_cli_args


def _bare_word(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    @functools.wraps(parse)
    def parse_or_bare_word(value: str) -> Any:
        return {"method": METHOD} if value == METHOD else parse(value)

    return parse_or_bare_word


def install() -> None:
    """Wrap ``EngineArgs``; a second call changes nothing."""
    from vllm.engine.arg_utils import EngineArgs

    if getattr(EngineArgs, "_specdecpp_installed", False):
        return
    EngineArgs.create_engine_config = _wrap_create_engine_config(EngineArgs.create_engine_config)
    EngineArgs.add_cli_args = staticmethod(_wrap_add_cli_args(EngineArgs.add_cli_args))
    EngineArgs._specdecpp_installed = True
