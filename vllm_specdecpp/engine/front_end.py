# SPDX-License-Identifier: Apache-2.0
"""What is wrapped in vLLM's front end once an engine with specdecpp was asked for: requests on their way in."""

from __future__ import annotations

import functools
from typing import Any

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
