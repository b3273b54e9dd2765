# SPDX-License-Identifier: Apache-2.0
"""What is measured on a GPU: draft rounds by how they run, vLLM's own (``native``) among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.gpu.shapes import DRAFTS

BATCHES = [1, 2, 4, 8, 16, 32, 64]
CANDIDATES = 5
"""Candidates a round while draft rounds are timed: the fixed rule's, so that all ways draft the same."""
LONGEST, STOPS = 20, (1, 4, 20)
"""Rounds of up to 20 candidates that the device ends after so many: what passes that nobody wants cost."""
MODES = ("eager", "per_pass", "if_nodes")


def draft_round_jobs(folder: Path, shapes: list[str], batches: list[int]) -> list[dict[str, Any]]:
    """One engine a draft shape and way to run it; the target is one layer, so that it costs nothing."""
    ways: list[tuple[str, str | None, int, dict[str, Any]]] = [
        ("native", None, CANDIDATES, {"method": "draft_model"}),
        *((mode, mode, CANDIDATES, {"rule": "fixed"}) for mode in MODES),
        ("if_nodes, rule scored", "if_nodes", CANDIDATES, _confidence(0.999999, CANDIDATES)),
        # Random weights are never sure of a candidate: the rule stops as soon as it may.
        *((f"{mode}, {k} of {LONGEST}", mode, LONGEST, _confidence(0.5, k)) for mode in MODES for k in STOPS),
    ]
    jobs = []
    for shape in shapes:
        draft = DRAFTS[shape].write(folder / shape)
        target = DRAFTS[shape].write(folder / f"target of {shape}", layers=1)
        for way, mode, most, options in ways:
            config = {"method": "specdecpp", "model": draft, "num_speculative_tokens": most, **options}
            jobs.append(
                {"draft": shape, "way": way, "target": target, "batches": batches, "mode": mode,
                 "speculative_config": config}
            )  # fmt: skip
    return jobs


def _confidence(threshold: float, shortest: int) -> dict[str, Any]:
    return {"rule": "confidence", "threshold": threshold, "min_speculative_tokens": shortest}
