# SPDX-License-Identifier: Apache-2.0
"""What a request's ``vllm.SamplingParams`` say about its drafts; pooling requests have none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_specdecpp.request_options import KEY, RequestOptions

_EPSILON = 1e-5
"""``vllm.sampling_params._SAMPLING_EPS``: less is no ``min_p``."""
_PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""With the value that changes nothing."""
_NO_CONSTRAINT = (KEY, "kv_transfer_params", "ec_transfer_params")
"""Keys of ``extra_args`` that vLLM's server sets itself (``ChatCompletionRequest.to_sampling_params``), and ours."""


def options_of(params: Any) -> RequestOptions:
    """What the request says about its own speculation."""
    try:
        return RequestOptions.from_extra_args(None if params is None else params.extra_args)
    except ValueError:  # refused on admission, unless an API server process without that check let it in
        return RequestOptions()


def why_plain(params: Any) -> str | None:
    """Why nothing is drafted for the request; None: it may be drafted for.

    vLLM refuses ``min_p`` and ``logit_bias`` with speculation (``SamplingParams._validate_spec_decode``). Without a
    candidate such a request has the one row that it has without speculation.
    """
    if getattr(params, "min_p", 0.0) > _EPSILON:
        return "min_p"
    if getattr(params, "logit_bias", None):
        return "logit_bias"
    return None if options_of(params).bound(1) else "switched_off"


def bound_of(params: Any, bound: int) -> int:
    """The request's upper bound on its candidate length, given the engine's."""
    return 0 if why_plain(params) else options_of(params).bound(bound)


def is_constrained(params: Any, defaults: Mapping[str, Any]) -> bool:
    """Whether the request's own constraints decide which candidates are accepted, so that they tell of no other.

    Args:
        params: ``vllm.SamplingParams``, or None.
        defaults: of this server (``ModelConfig.get_diff_sampling_param``): a penalty that all requests have is none.
    """
    if params is None:
        return False
    return (
        any(getattr(params, name, none) not in (none, defaults.get(name)) for name, none in _PENALTIES.items())
        or any(getattr(params, name, None) for name in ("allowed_token_ids", "bad_words", "structured_outputs"))
        or getattr(params, "thinking_token_budget", None) is not None
        or any(key not in _NO_CONSTRAINT for key in params.extra_args or ())  # of a logits processor
    )


def stop_tokens_of(params: Any) -> list[int]:
    """The tokens that end the request, the end-of-sequence token first."""
    if params is None:
        return []
    first = [] if params.eos_token_id is None else [params.eos_token_id]
    return first + sorted(set(params.stop_token_ids or ()) - set(first))
