# SPDX-License-Identifier: Apache-2.0
"""What draft passes and verifications cost on this machine: timed at start-up.

The passes are timed without attention, sampling and scheduling; :class:`CostModel` learns the rest from real rounds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from vllm_specdecpp.costs.model import CURVES, Points, suggested_widths
from vllm_specdecpp.costs.widths import Rows, padded_times

logger = logging.getLogger("vllm.specdecpp")

MAX_TOKENS = 4096
"""Widest verification that the cost model keeps apart; beyond it the slope goes on."""
MAX_WIDTH = 1024
"""Widest pass that is timed, where there is time for it; the curves go on with their slope. A GPU reads weights up to a
few hundred rows: from these a row looks cheaper than it is."""
SHARE, LEAST, MOST = 0.06, 1.0, 8.0
"""This share of the start's time so far is spent on timing, at least and at most so many seconds. Widths that are not
timed lie on the line through those that are, until real rounds correct them."""
ALWAYS = 4
"""Widths of a curve that are timed whatever they take: 1, 4, 16 and 64 rows. Fewer leave the price of a wide
verification to a line through narrow ones, and rounds that cost twice as much are outliers, which teach slowly."""
LONG = 0.5
"""Seconds of a run that is not repeated, if the width before it needed no kernels to be built."""
REPEATS = 3
"""Timed runs of a narrow width; one is enough for wide ones, which last longer and where less depends on each."""
NARROW = 16


def most_tokens(scheduler_config: Any) -> int:
    """Widest verification that is kept apart; ``scheduler_config``: vLLM's."""
    return min(scheduler_config.max_num_batched_tokens, MAX_TOKENS)


class Passes(Protocol):
    """What is timed; see :class:`vllm_specdecpp.engine.v1.timing.SinglePasses`."""

    @property
    def target_to_draft(self) -> float | None: ...

    def draft(self, num_rows: int) -> None: ...

    def draft_logits(self, num_rows: int) -> None: ...

    def target(self, num_rows: int) -> None: ...

    def pad(self, times: Points) -> Rows: ...


def time_widths(
    run: Callable[[int], object],
    widths: Sequence[int],
    agree: Callable[[torch.Tensor], torch.Tensor],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[int, float]:
    """Least seconds of ``run(width)``.

    The least of a few, not their mean: what else runs on the machine can only add time. All widths are timed once, then
    the narrow ones again and again: a slow moment of the machine then does not hit one width alone.

    Args:
        run: one pass; returns when the device has finished it. Ranks of a tensor-parallel group meet in it.
        widths: in the order in which they are timed.
        agree: rank 0's tensor on every rank, so that all stop at the same width.
        seconds: half of them for the first runs of all widths but :data:`ALWAYS`, as far as can be foreseen; what is
            left then for further runs of narrow ones.
        clock: seconds from any start.
    """
    times: dict[int, float] = {}
    start, builds = clock(), True

    def once(width: int) -> float:
        before = clock()
        run(width)
        return clock() - before

    for width in widths:
        if len(times) >= ALWAYS:
            near = max(w for w in times if w < width or w == min(times))
            late = clock() - start + times[near] * width / near > seconds / 2
            if bool(agree(torch.tensor([late]))):
                continue
        times[width] = first = once(width)
        if bool(agree(torch.tensor([builds or first < LONG]))):
            times[width] = once(width)
            builds = first > 1.3 * times[width]
    narrow = [width for width in times if width <= NARROW]
    for _ in range(REPEATS - 1):
        if bool(agree(torch.tensor([clock() - start + sum(times[width] for width in narrow) > seconds]))):
            break
        for width in narrow:
            times[width] = min(times[width], once(width))
    timed = sorted(times)
    agreed = agree(torch.tensor([times[width] for width in timed], dtype=torch.float64))
    return dict(zip(timed, agreed.tolist(), strict=True))


def coarse_to_fine(max_width: int) -> list[int]:
    """Widths to time, up to ``max_width`` or :data:`MAX_WIDTH`.

    First powers of four, then the widest, then powers of two, then the rest: timing that ends early covers the range.
    """
    max_width = min(max_width, MAX_WIDTH)
    fours = [4**n for n in range(max_width.bit_length()) if 4**n < max_width]
    twos = [2 * n for n in fours if 2 * n < max_width]
    coarse = [*fours, max_width, *twos] if max_width > 1 else [1]
    return coarse + [width for width in suggested_widths(max_width) if width not in coarse]


def measure(
    passes: Passes,
    scheduler_config: Any,
    max_length: int,
    agree: Callable[[torch.Tensor], torch.Tensor],
    waited: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Points:
    """Time both models, and choose the widths that narrow passes run at; every rank must call it.

    Args:
        passes: runs single passes.
        scheduler_config: vLLM's, for the widest batch.
        max_length: upper bound on the candidate length.
        agree: rank 0's tensor on every rank.
        waited: seconds that the start has taken so far.
        clock: seconds from any start.

    Returns:
        The curves of :class:`CostModel`, of passes at the chosen widths.
    """
    logger.info("specdecpp: measuring what draft passes and verifications cost")
    start = clock()
    end = start + min(max(SHARE * waited, LEAST), MOST)
    most = scheduler_config.max_num_batched_tokens
    num_reqs = min(scheduler_config.max_num_seqs, most)

    def timed(run: Callable[[int], object], max_width: int, share: float) -> dict[int, float]:
        return time_widths(run, coarse_to_fine(max_width), agree, share * (end - clock()), clock)

    times = {"draft": timed(passes.draft, most, 1 / 3), "logits": timed(passes.draft_logits, num_reqs, 1 / 3)}
    ratio = passes.target_to_draft
    if ratio is None:
        times["target"] = timed(passes.target, min(num_reqs * (max_length + 1), most), 1.0)
    rows = passes.pad(times)
    times = {name: padded_times(curve, rows.get(name, ())) for name, curve in times.items()}
    draft = times["draft"]
    verify = times.get("target") or {n: (ratio or 1.0) * seconds for n, seconds in draft.items()}
    widest = max(draft)
    # A GPU takes for a few hundred tokens what it takes for one: these do not tell the slope of reading beyond.
    cheap = widest < most and 2 * draft[widest] * most / widest < end - clock()
    further = time_widths(passes.draft, [most], agree, 0.0, clock) if bool(agree(torch.tensor([cheap]))) else {}
    points = {**curves(draft, times["logits"], verify), "read": draft | further}
    shown = {name: {n: f"{1e3 * t:.1f} ms" for n, t in list(curve.items())[:4]} for name, curve in points.items()}
    logger.info("specdecpp: measured in %.1f s: %s, ...", clock() - start, shown)
    return points


def measure_target(
    passes: Passes,
    scheduler_config: Any,
    max_length: int,
    agree: Callable[[torch.Tensor], torch.Tensor],
    waited: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Points:
    """As :func:`measure`, where there is no draft model: a pass of it counts as one of the target, and none is run."""
    most = scheduler_config.max_num_batched_tokens
    widest = min(min(scheduler_config.max_num_seqs, most) * (max_length + 1), most)
    seconds = min(max(SHARE * waited, LEAST), MOST)
    times = time_widths(passes.target, coarse_to_fine(widest), agree, seconds, clock)
    verify = padded_times(times, passes.pad({"target": times}).get("target", ()))
    logger.info("specdecpp: measured what verifications cost: %.1f ms for one row", 1e3 * verify[1])
    return {name: dict(verify) for name in CURVES}


def curves(draft: Mapping[int, float], logits: Mapping[int, float], verify: Mapping[int, float]) -> Points:
    """The cost model's curves of drafting and verifying, from times of single passes.

    Args:
        draft: rows -> seconds of the draft model's forward pass.
        logits: rows -> seconds of its lm_head.
        verify: rows -> seconds of the target's forward pass and lm_head.
    """
    widths = sorted(draft)

    def drawn(rows: int) -> dict[int, float]:
        """Of passes with ``rows`` rows a request, which draw for each; between two that were timed the line counts."""
        times = [draft[w] for w in widths]
        return {n: float(np.interp(rows * n, widths, times)) + logits[n] for n in logits if rows * n <= widths[-1]}

    step, first = drawn(1), drawn(2)  # a round's first pass reads about two tokens of each request
    return {"first": first, "step": step, "verify": dict(verify)}
