# SPDX-License-Identifier: Apache-2.0
"""What a request's ``vllm.SamplingParams`` say about its drafts; pooling requests have none."""

from __future__ import annotations

from typing import Any

from vllm_specdecpp.request_options import RequestOptions


def options_of(params: Any) -> RequestOptions:
    """What the request says about its own speculation."""
    try:
        return RequestOptions.from_extra_args(None if params is None else params.extra_args)
    except ValueError:  # refused on admission, unless an API server process without that check let it in
        return RequestOptions()


def stop_tokens_of(params: Any) -> list[int]:
    """The tokens that end the request, the end-of-sequence token first."""
    if params is None:
        return []
    first = [] if params.eos_token_id is None else [params.eos_token_id]
    return first + sorted(set(params.stop_token_ids or ()) - set(first))
