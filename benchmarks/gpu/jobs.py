# SPDX-License-Identifier: Apache-2.0
"""What is measured on a GPU: draft rounds by how they run, and whole engines against vLLM's own draft model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.gpu.shapes import DRAFTS, TARGETS

BATCHES = [1, 2, 4, 8, 16, 32, 64]
CANDIDATES = 5
"""Candidates a round while draft rounds are timed: the fixed rule's, so that all ways draft the same."""
LONGEST, STOPS = 20, (1, 4, 20)
"""Rounds of up to 20 candidates that the device ends after so many: what passes that nobody wants cost."""
MODES = ("native", "eager", "per_pass", "if_nodes")
ACCEPTANCE = [0.8, 0.64, 0.51, 0.41, 0.33, 0.26, 0.21, 0.17]
"""P(the first k candidates are accepted) of the synthetic verification: 0.8 a candidate."""


def draft_round_jobs(folder: Path, shapes: list[str], batches: list[int]) -> list[dict[str, Any]]:
    """One engine a draft shape and way to run it; the target is one layer, so that it costs nothing."""
    jobs = []
    for shape in shapes:
        draft = DRAFTS[shape].write(folder / shape)
        target = DRAFTS[shape].write(folder / f"target of {shape}", layers=1)
        for mode in MODES:
            config: dict[str, Any] = {"method": "draft_model", "model": draft, "num_speculative_tokens": CANDIDATES}
            if mode != "native":
                config |= {"method": "specdecpp", "rule": "fixed"}
            jobs.append(
                {"measure": "draft_rounds", "draft": shape, "way": mode, "target": target, "batches": batches,
                 "mode": None if mode == "native" else mode, "speculative_config": config}
            )  # fmt: skip
        rule = {"rule": "confidence", "threshold": 0.999999, "min_speculative_tokens": CANDIDATES}
        config = {"method": "specdecpp", "model": draft, "num_speculative_tokens": CANDIDATES, **rule}
        jobs.append(
            {"measure": "draft_rounds", "draft": shape, "way": "if_nodes, rule scored", "target": target,
             "batches": batches, "mode": "if_nodes", "speculative_config": config}
        )  # fmt: skip
        for mode in MODES[1:]:
            for stop in STOPS:  # random weights are never sure of a candidate: the rule stops as soon as it may
                rule = {"rule": "confidence", "threshold": 0.5, "min_speculative_tokens": stop}
                config = {"method": "specdecpp", "model": draft, "num_speculative_tokens": LONGEST, **rule}
                jobs.append(
                    {"measure": "draft_rounds", "draft": shape, "way": f"{mode}, {stop} of {LONGEST}",
                     "target": target, "batches": batches, "mode": mode, "speculative_config": config}
                )  # fmt: skip
    return jobs


def end_to_end_jobs(folder: Path, batches: list[int], layers: int | None) -> list[dict[str, Any]]:
    """A 70B-shaped fp8 target with a 1B draft: off, vLLM's draft_model at several K, and ours.

    Acceptance is synthetic and knows nothing of the draft's confidence, so a stop rule can win nothing here: what
    shows is what drafting, verifying and scheduling cost.
    """
    target = TARGETS["70B"].write(folder / "70B", layers=layers)
    draft = DRAFTS["1B"].write(folder / "1B")
    shared = {"measure": "end_to_end", "target": target, "batches": batches, "engine": {"quantization": "fp8"}}
    jobs: list[dict[str, Any]] = [{**shared, "way": "off", "speculative_config": None}]
    for num_candidates in (3, 5, 8):
        synthetic = {
            "rejection_sample_method": "synthetic", "synthetic_acceptance_rates": ACCEPTANCE[:num_candidates],
            "model": draft, "num_speculative_tokens": num_candidates,
        }  # fmt: skip
        for method, options in (("draft_model", {}), ("specdecpp", {"rule": "fixed"})):
            config = {"method": method, **synthetic, **options}
            jobs.append({**shared, "way": f"{method}, K={num_candidates}", "speculative_config": config})
    # What the default rule adds to a round: its launches, its host side, its own choice of a length.
    config = {"method": "specdecpp", **synthetic}
    jobs.append({**shared, "way": f"specdecpp, cost_aware, K<={num_candidates}", "speculative_config": config})
    return jobs
