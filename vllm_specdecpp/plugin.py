# SPDX-License-Identifier: Apache-2.0
"""Entry point ``vllm.general_plugins``: teaches vLLM's front end the word ``specdecpp``.

vLLM calls :func:`register` in every process, possibly several times, and without a guard: it must be idempotent,
cheap and must never raise. What goes wrong here is kept and told only to a user who asks for ``specdecpp``.
"""

from __future__ import annotations

import logging

logger = logging.getLogger("vllm.specdecpp")


def register() -> None:
    """Wrap three methods of the ledger; every other process hook is an official option."""
    try:
        from vllm_specdecpp.engine.options import install

        install()
    except Exception as error:  # a plugin that raises here would kill every vLLM start on this machine
        logger.warning("specdecpp is not available, vLLM itself is unaffected: %s", error)
