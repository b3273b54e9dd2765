# SPDX-License-Identifier: Apache-2.0
"""Turns ``method: specdecpp`` into vLLM's own options, in the front-end process.

The user's speculative config becomes a plain ``draft_model`` one, our options travel in
``additional_config["specdecpp"]`` and ``worker_cls`` names our Worker: all official, all carried to spawned workers.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from importlib.metadata import entry_points
from typing import Any

from pydantic import ValidationError

from vllm_specdecpp.config import SpecDecPPConfig
from vllm_specdecpp.engine import front_end, gpu_defaults
from vllm_specdecpp.engine.front_end import ADDITIONAL_CONFIG_KEY
from vllm_specdecpp.engine.shared import draft_limit, vocabulary
from vllm_specdecpp.engine.shared.one_row import schedule_one_row
from vllm_specdecpp.engine.supported import require_supported
from vllm_specdecpp.engine.v1 import draft_layers
from vllm_specdecpp.rule_registry import RULES, no_device_tail
from vllm_specdecpp.source_registry import ON_DEVICE, has_no_draft

logger = logging.getLogger("vllm.specdecpp")

METHOD = "specdecpp"

_REFUSED = {
    "parallel_drafting": "one pass proposes all candidates, so there is nothing to stop early",
    "use_local_argmax_reduction": "the stop rule needs the draft's logits",
    "use_heterogeneous_vocab": "draft and target must share a vocabulary",
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


def _is_mistyped(method: Any) -> bool:
    """Whether a word can only have been meant to be ours."""
    if not isinstance(method, str) or method == METHOD:
        return False
    return bool(difflib.get_close_matches(method.lower(), [METHOD], cutoff=0.75))


def _mistyped(method: Any) -> str:
    return f"unknown speculative method {method!r}; did you mean {METHOD!r}?"


def _user_dict(args: Any) -> dict[str, Any] | None:
    """The speculative config as a dict, with ``_`` for ``-`` in its keys, if it asks for our method, else None."""
    raw = args.speculative_config
    if isinstance(raw, str):
        raw = {"method": raw}
    given = [(str(k).replace("-", "_"), v) for k, v in raw.items()] if isinstance(raw, Mapping) else []
    merged: dict[str, Any] = dict(given)
    methods = merged.get("method"), args.spec_method
    if METHOD not in methods:
        for method in methods:
            if _is_mistyped(method):
                raise ValueError(f"specdecpp: {_mistyped(str(method))}")
        return None
    for key, _ in given:
        if sum(key == other for other, _ in given) > 1:
            raise ValueError(f"specdecpp: {key} is given twice, with '-' and with '_'; leave one out")
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
    draft_ranks = user.get("draft_tensor_parallel_size")
    if draft_ranks not in (None, args.tensor_parallel_size):
        raise ValueError(
            f"specdecpp: draft_tensor_parallel_size={draft_ranks} must be that of the target, "
            f"{args.tensor_parallel_size}; leave it out"
        )
    method = user.get("rejection_sample_method")
    if method in ("fly", "synthetic"):
        raise ValueError(
            f"specdecpp: rejection_sample_method={method!r} accepts tokens that the target would not emit, so outputs "
            "are no longer the target's; leave it out, or use 'standard' or 'block'"
        )
    if (stages := getattr(args, "pipeline_parallel_size", 1)) > 1:
        raise ValueError(
            f"specdecpp: pipeline_parallel_size={stages} is not supported: vLLM runs a draft model on the last stage "
            "only, and the stages before it would stand still meanwhile; use 1, and more --tensor-parallel-size"
        )
    if not isinstance(args.additional_config or {}, dict):
        raise ValueError(
            f"specdecpp: --additional-config must be a JSON object to carry our options, not a "
            f"{type(args.additional_config).__name__}"
        )


def _needs_v1(config: SpecDecPPConfig) -> str | None:
    """The option that only Model Runner V1 can serve, with the reason, or None."""
    if not RULES[config.resolved_rule].device_tail:
        return no_device_tail(config.resolved_rule)
    if config.sources is not None and (others := [name for name in config.run_sources if name not in ON_DEVICE]):
        return f"sources={config.sources}: Model Runner V2 does not have {', '.join(map(repr, others))}"
    return None


def _needs_v2(args: Any, user: Mapping[str, Any]) -> str | None:
    """The option that only Model Runner V2 can serve, with the reason, or None."""
    if user.get("enable_adaptive_verification"):
        return "enable_adaptive_verification=True needs Model Runner V2"
    if args.async_scheduling:
        return (
            "--async-scheduling books a fixed number of draft slots, which Model Runner V1 cannot cut to each "
            "request's length"
        )
    return None


def _select_model_runner(args: Any, user: Mapping[str, Any], config: SpecDecPPConfig) -> None:
    """Leave the model runner to vLLM, unless an option of ours can only run on V1 and nobody asked for V2.

    Raises:
        ValueError: one line: an option that the runner cannot serve.
    """
    import vllm.envs as envs
    from vllm.triton_utils import HAS_TRITON

    wanted = envs.VLLM_USE_V2_MODEL_RUNNER
    only_v1, only_v2 = _needs_v1(config), _needs_v2(args, user)
    if only_v2 is not None and (wanted is False or (wanted is None and not HAS_TRITON)):
        raise ValueError(f"specdecpp: {only_v2}; leave it out")
    if only_v1 is not None and (wanted or only_v2 is not None):
        mend = "set VLLM_USE_V2_MODEL_RUNNER=0" if only_v2 is None else f"leave one out, for {only_v2}"
        raise ValueError(f"specdecpp: {only_v1}; {mend}, or choose another one")
    if user.get("enable_adaptive_verification") and config.resolved_rule == "fixed":
        raise ValueError(
            "specdecpp: enable_adaptive_verification=True sizes the verification by the rule's estimates, and "
            "rule='fixed' makes none; choose another rule"
        )
    if user.get("enable_adaptive_verification") and gpu_defaults.samples_drafts(user):
        raise ValueError(
            f"specdecpp: enable_adaptive_verification=True cannot be used with {gpu_defaults.SAMPLED}; leave one out"
        )
    if only_v1 is not None and wanted is None and HAS_TRITON:
        # Without Triton vLLM runs V1 anyway, and other engines of this process keep their choice.
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # worker processes inherit it
        logger.info("specdecpp: using Model Runner V1 (VLLM_USE_V2_MODEL_RUNNER=0): %s", only_v1)


def _may_run_v2(config: SpecDecPPConfig) -> bool:
    """Whether vLLM may choose Model Runner V2."""
    import vllm.envs as envs
    from vllm.triton_utils import HAS_TRITON

    wanted = envs.VLLM_USE_V2_MODEL_RUNNER
    return _needs_v1(config) is None and bool(HAS_TRITON if wanted is None else wanted)


def _check_model_runner(args: Any, config: SpecDecPPConfig, vllm_config: Any) -> None:
    """Once vLLM has chosen: it prefers V1 for some models and options.

    Raises:
        ValueError: one line: an option that the chosen runner cannot serve.
    """
    if vllm_config.use_v2_model_runner:
        if (reason := _needs_v1(config)) is not None:
            raise ValueError(f"specdecpp: {reason}; set VLLM_USE_V2_MODEL_RUNNER=0, or choose another one")
        return
    if given := _logits_processors(args):
        raise ValueError(
            f"specdecpp: the logits processors {given} cannot be used: Model Runner V1 does not apply them to "
            "candidates; leave them out, or use processors of Model Runner V2 on it"
        )
    if (reason := _needs_v2(args, args.speculative_config)) is not None:
        raise ValueError(f"specdecpp: {reason}, and vLLM chose V1 for this model and these options; leave it out")


def _check_data_parallel(vllm_config: Any) -> None:
    """Refuse an MoE target, whose engines run each pass together (ValueError, one line); dense ones are independent."""
    if (ranks := vllm_config.parallel_config.data_parallel_size) > 1 and vllm_config.model_config.is_moe:
        raise ValueError(
            f"specdecpp: data_parallel_size={ranks} is not supported with a mixture of experts as the target: its "
            "ranks run every pass together, and draft for themselves; use 1, and more --tensor-parallel-size"
        )


def _logits_processors(args: Any) -> list[str]:
    """Custom ones, given or installed, by name; with speculation V1 refuses the former and leaves the latter out."""
    given = [str(getattr(item, "__qualname__", item)) for item in args.logits_processors or ()]
    return given + [point.name for point in entry_points(group="vllm.logits_processors")]


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

    if has_no_draft(user):
        user["model"] = str(args.model)
    if not user.get("model"):
        from vllm_specdecpp.pairs import find_pair

        pair = find_pair(str(args.model))
        user["model"] = pair.draft
        rule = user.get("rule")
        if pair.head is not None and (rule is None or (rule in RULES and RULES[rule].reads_head)):
            user.setdefault("head", pair.head)
    if user.get("num_speculative_tokens") is None and gpu_defaults.on_gpu():
        user["num_speculative_tokens"] = gpu_defaults.default_length(args, user)
    config, passed_on = SpecDecPPConfig.from_speculative_config(
        user, passthrough=[f.name for f in fields(SpeculativeConfig)]
    )
    _check_engine_args(args, user)
    args.speculative_config = {**passed_on, "method": "draft_model"}
    args.spec_method = args.spec_model = args.spec_tokens = None
    args.additional_config = {**(args.additional_config or {}), ADDITIONAL_CONFIG_KEY: config.to_additional_config()}
    args.worker_cls = _worker_cls()
    _select_model_runner(args, user, config)
    return config


def _check_head(config: SpecDecPPConfig, vllm_config: Any) -> None:
    """Load the head once in the front end, so that a bad one fails here and not inside a worker."""
    if config.head is None:
        return
    from vllm_specdecpp.head.files import same_model
    from vllm_specdecpp.head.model import AcceptanceHead
    from vllm_specdecpp.provenance import shrinking

    head = AcceptanceHead.from_pretrained(
        config.head,
        revision=config.head_revision,
        expected_hidden_size=vllm_config.speculative_config.draft_model_config.get_hidden_size(),
        expected_draft=config.model,
    )
    origin = shrinking(config.model).get("source")
    if origin is not None and same_model(str(head.metadata.get("draft", "")), origin):
        logger.warning(
            "specdecpp: head %s was trained on %s, the draft before it was shrunk: its scores are calibrated online",
            config.head, origin,
        )  # fmt: skip


def _announce(config: SpecDecPPConfig) -> None:
    bound = f"threshold {config.resolved_threshold}, " if config.resolved_threshold is not None else ""
    source = f"head {config.head}" if config.head else "no head given: training-free"
    least = 0 if config.resolved_rule == "cost_aware" else config.min_speculative_tokens
    draft = config.model if config.drafts else f"none, sources {config.run_sources}"
    logger.info(
        "specdecpp: draft %s, rule %s (%s), %scandidate length %d to %d",
        *(draft, config.resolved_rule, source, bound, least, config.num_speculative_tokens),
    )


def _wrap_create_engine_config(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return create(self, *args, **kwargs)
        except ValueError as error:
            if str(error).startswith("specdecpp"):
                # A user's mistake: one line tells it all, and the frames that found it tell nothing.
                raise error.with_traceback(None) from None
            raise

    def create(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = expand(self)
        if config is None:
            return original(self, *args, **kwargs)
        scheduling = gpu_defaults.Scheduling(self, config, may_run_v2=_may_run_v2(config))

        def make() -> Any:
            try:
                with vocabulary.compared_by_token():
                    return original(self, *args, **kwargs)
            except ValidationError as error:
                if scheduling.take_back(_one_line(error)):
                    return make()
                what = f"model={config.model!r} as draft of {self.model!r}"
                raise ValueError(f"specdecpp: {what}: {_one_line(error)}") from error

        vllm_config = make()
        if not vllm_config.use_v2_model_runner and scheduling.take_back("vLLM chose Model Runner V1"):
            vllm_config = make()
        _check_model_runner(self, config, vllm_config)
        _check_data_parallel(vllm_config)
        if config.drafts:
            draft_layers.keep_alike(vllm_config)
        else:
            vllm_config.speculative_config.draft_model_config = vllm_config.model_config
        schedule_one_row(vllm_config)
        _check_head(config, vllm_config)
        front_end.check_requests()
        front_end.show_metrics()
        gpu_defaults.check_memory(self, vllm_config)
        _announce(config)
        scheduling.announce()
        return vllm_config

    return create_engine_config


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
        if _is_mistyped(value):
            raise argparse.ArgumentTypeError(_mistyped(value))
        return {"method": METHOD} if value == METHOD else parse(value)

    return parse_or_bare_word


def install() -> None:
    """Wrap ``EngineArgs``, and what ``SpeculativeConfig`` and ``VllmConfig`` make of a draft; a second call changes
    nothing."""
    from vllm.config import VllmConfig
    from vllm.config.speculative import SpeculativeConfig
    from vllm.engine.arg_utils import EngineArgs

    if getattr(EngineArgs, "_specdecpp_installed", False):
        return
    EngineArgs.create_engine_config = _wrap_create_engine_config(EngineArgs.create_engine_config)
    EngineArgs.add_cli_args = staticmethod(_wrap_add_cli_args(EngineArgs.add_cli_args))
    SpeculativeConfig.verify_equal_vocab_size_if_draft_model = vocabulary.wrap_check(
        SpeculativeConfig.verify_equal_vocab_size_if_draft_model
    )
    if (shorten := getattr(VllmConfig, draft_limit.SHORTENS, None)) is not None:
        setattr(VllmConfig, draft_limit.SHORTENS, draft_limit.wrap_shortening(shorten))
    EngineArgs._specdecpp_installed = True
