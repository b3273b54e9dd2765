# SPDX-License-Identifier: Apache-2.0
"""What one request may say about its own speculation.

Offline: ``SamplingParams(extra_args={"specdecpp": {"enabled": False}})``. Over HTTP, in the request's ``vllm_xargs``:
``{"specdecpp": "off"}``, or an object as JSON text. vLLM takes only texts and numbers there and turns true and false
into 1 and 0; so 1 and 0 mean on and off.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

KEY = "specdecpp"
_WORDS = {"off": False, "on": True}
_SHOW = 'e.g. {"enabled": false}, {"num_speculative_tokens": 4}, "off"'


class RequestOptions(BaseModel):
    """One request's wishes; they can only take away from what the engine would draft."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    enabled: bool = True
    """False: nothing is drafted for this request."""

    num_speculative_tokens: int | None = Field(default=None, ge=0)
    """Upper bound on this request's candidate length; 0 drafts nothing, and the engine's own bound still holds."""

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any] | None) -> RequestOptions:
        """Read ``SamplingParams.extra_args``; other plugins' keys are not looked at.

        Raises:
            ValueError: one line naming the key, the value and the mend.
        """
        if not extra_args or extra_args.get(KEY) is None:
            return cls()
        given = extra_args[KEY]
        value = _parsed(given)
        if isinstance(value, int) and value in (0, 1):  # false and true, as they come over HTTP
            value = {"enabled": bool(value)}
        if not isinstance(value, Mapping):
            raise ValueError(f"specdecpp: extra_args[{KEY!r}]={given!r} must be an object, on or off; {_SHOW}")
        for name in value:
            if name not in cls.model_fields:
                near = difflib.get_close_matches(str(name), cls.model_fields, n=1)
                mend = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(cls.model_fields)}"
                raise ValueError(f"specdecpp: extra_args[{KEY!r}] has the unknown key {name!r}; {mend}")
        try:
            return cls.model_validate(dict(value))
        except ValidationError as error:
            name = str(error.errors()[0]["loc"][0])
            mend = "true or false" if name == "enabled" else "a whole number, 0 or more"
            raise ValueError(f"specdecpp: extra_args[{KEY!r}] {name}={value[name]!r} must be {mend}; {_SHOW}") from None

    def bound(self, engine_bound: int) -> int:
        """This request's upper bound on the candidate length, given the engine's."""
        if not self.enabled:
            return 0
        return engine_bound if self.num_speculative_tokens is None else min(engine_bound, self.num_speculative_tokens)


def _parsed(value: Any) -> Any:
    """Texts as the words on and off, or as JSON; anything else as it is."""
    if not isinstance(value, str):
        return value
    if value.strip().lower() in _WORDS:
        return _WORDS[value.strip().lower()]
    try:
        return json.loads(value)
    except ValueError:
        return value
