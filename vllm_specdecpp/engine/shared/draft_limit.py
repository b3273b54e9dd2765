# SPDX-License-Identifier: Apache-2.0
"""Where the draft model's context ends, if that is before the target's.

vLLM stops drafting for the whole batch once a request gets near that end, and lets the target verify zeros. Here such a
request alone drafts no further: candidate k of a request whose last token stands at position p is drawn from a pass
that reads position p + k - 1, which must lie before the end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm.logger import init_logger

from vllm_specdecpp.engine.front_end import ADDITIONAL_CONFIG_KEY

logger = init_logger("vllm.specdecpp")


SHORTENS = "_limit_max_model_len_to_draft"
"""Method of ``VllmConfig`` that makes the target's context the draft's; vLLM 0.33 has it, for Model Runner V2."""


def wrap_shortening(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """Let vLLM do so without us: here a request goes on beyond the draft's context."""

    @functools.wraps(original)
    def shorten(self: Any) -> None:
        if ADDITIONAL_CONFIG_KEY not in (self.additional_config or {}):
            original(self)

    return shorten


def draft_limit(vllm_config: Any) -> int:
    """Positions that the draft model has, at most the target's ``max_model_len``.

    A ``max_model_len`` in the speculative config counts, too: vLLM makes it the draft's
    (``SpeculativeConfig._maybe_override_draft_max_model_len``).
    """
    limit = min(
        vllm_config.model_config.max_model_len, vllm_config.speculative_config.draft_model_config.max_model_len
    )  # fmt: skip
    return int(limit)


def longest_drafted(vllm_config: Any) -> int:
    """How long a sequence may become while it is drafted for, in tokens.

    Two more than the draft model has positions: it never reads a round's last candidate, nor the target's own token.
    """
    return min(int(vllm_config.model_config.max_model_len), draft_limit(vllm_config) + 2)


def warn_of_end(limit: int) -> None:
    """Say, once, that a request goes on without drafts."""
    logger.warning_once(
        "specdecpp: a request has got beyond the draft model's %d positions and goes on without speculation; a draft "
        "model with a longer context would go on drafting",
        limit,
    )
