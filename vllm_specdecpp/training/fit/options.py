# SPDX-License-Identifier: Apache-2.0
"""The options of ``fit``, and which of them its folder depends on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from vllm_specdecpp.training.collect.options import PairOptions

if TYPE_CHECKING:
    from vllm_specdecpp.data.prompts import Prompt

_FREE = {"out", "prompts", "limit", "split", "column", "batch", "kv_cache_mib", "max_model_len"}
"""Options that may differ when a run goes on: they shape no label, or the prompts' digest stands for them."""


class FitOptions(PairOptions):
    """From a pair of models to a tuned acceptance head, and whether it pays.

    Runs collect, train, calibrate and tune; interrupted, the same command goes on. A share of the prompts judges the
    head, and nothing is fitted to them. Ends with the verdict and the line that serves the pair.
    """

    out: Path
    """Folder for all that is made: prompts, data, costs, head, tables."""

    held_out: float = Field(default=0.3, gt=0, lt=1)
    """Share of the prompts that judges the head."""

    costs: Path | None = None
    """What passes cost on this machine: the file of an engine of this pair. By default an engine is started for it."""


def settings(options: FitOptions, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What makes another run's output another one, as JSON: option → value."""
    from vllm_specdecpp.data.prompts import digest
    from vllm_specdecpp.provenance import model_label, model_revision

    models = {
        name: " ".join(filter(None, (model_label(model), model_revision(model))))
        for name, model in (("target", options.target), ("draft", options.draft))
    }
    kept = options.model_dump(mode="json", exclude=_FREE)
    return kept | models | {"prompts": f"{len(prompts)} with digest {digest(prompts)[:12]}"}
