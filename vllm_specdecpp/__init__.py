# SPDX-License-Identifier: Apache-2.0
"""SpecDec++ for vLLM: speculative decoding whose candidate length is decided per request and round.

Importing this package is cheap: vLLM's plugin loader imports it in every process, so neither torch nor vLLM is
imported before a name below is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_specdecpp.config import SpecDecPPConfig
    from vllm_specdecpp.head.model import AcceptanceHead
    from vllm_specdecpp.pairs import find_pair, known_pairs

__version__ = "0.1.0"
__all__ = ["AcceptanceHead", "SpecDecPPConfig", "__version__", "find_pair", "known_pairs"]

_HOME_OF = {
    "AcceptanceHead": "head.model",
    "SpecDecPPConfig": "config",
    "find_pair": "pairs",
    "known_pairs": "pairs",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
