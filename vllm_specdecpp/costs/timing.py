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

logger = logging.getLogger("vllm.specdecpp")

MAX_TOKENS = 4096
"""Widest verification that the cost model keeps apart; beyond it the slope goes on."""
MAX_WIDTH = 256
"""Widest pass that is timed; the curves go on with their slope."""
SECONDS_PER_CURVE = 3.0
"""A width that would end later is left to the line through those that were timed; real rounds put it right."""
LONG = 0.5
"""Seconds of a run that is not repeated, if the width before it needed no kernels to be built."""
REPEATS = 3
"""Timed runs of a narrow width; one is enough for wide ones, which last longer and where less depends on each."""
NARROW = 16
READ = (16, 64, 256)
"""Tokens of the draft passes that are timed for reading prompts."""


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


def time_widths(
    run: Callable[[int], object],
    widths: Sequence[int],
    agree: Callable[[torch.Tensor], torch.Tensor],
    seconds: float = SECONDS_PER_CURVE,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[int, float]:
    """Least seconds of ``run(width)``.

    The least of a few, not their mean: what else runs on the machine can only add time. All widths are timed once, then
    the narrow ones again and again: a slow moment of the machine then does not hit one width alone.

    Args:
        run: one pass; returns when the device has finished it. Ranks of a tensor-parallel group meet in it.
        widths: in the order in which they are timed.
        agree: rank 0's tensor on every rank, so that all stop at the same width.
        seconds: in which all widths but the first four are timed, as far as can be foreseen.
        clock: seconds from any start.
    """
    times: dict[int, float] = {}
    start, builds = clock(), True

    def once(width: int) -> float:
        before = clock()
        run(width)
        return clock() - before

    for width in widths:
        if len(times) >= 4:
            near = max(w for w in times if w < width or w == min(times))
            late = clock() - start + times[near] * width / near > seconds
            if bool(agree(torch.tensor([late]))):
                continue
        times[width] = first = once(width)
        if bool(agree(torch.tensor([builds or first < LONG]))):
            times[width] = once(width)
            builds = first > 1.3 * times[width]
    for _ in range(REPEATS - 1):
        for width in times:
            if width <= NARROW:
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
    passes: Passes, scheduler_config: Any, max_length: int, agree: Callable[[torch.Tensor], torch.Tensor]
) -> Points:  # fmt: skip
    """Time both models, seconds on a CPU; every rank of a tensor-parallel group must call it.

    Args:
        passes: runs single passes.
        scheduler_config: vLLM's, for the widest batch.
        max_length: upper bound on the candidate length.
        agree: rank 0's tensor on every rank.

    Returns:
        The curves of :class:`CostModel`.
    """
    logger.info("specdecpp: measuring what draft passes and verifications cost")
    start = time.perf_counter()
    most = scheduler_config.max_num_batched_tokens
    num_reqs = min(scheduler_config.max_num_seqs, most)
    draft = time_widths(passes.draft, coarse_to_fine(min(2 * num_reqs, most)), agree)
    logits = time_widths(passes.draft_logits, coarse_to_fine(num_reqs), agree)
    ratio = passes.target_to_draft
    if ratio is None:
        verify = time_widths(passes.target, coarse_to_fine(min(num_reqs * (max_length + 1), most)), agree)
    else:
        verify = {n: ratio * seconds for n, seconds in draft.items()}
    points = {**curves(draft, logits, verify), "read": _time_reading(passes, draft, most, agree)}
    shown = {name: {n: f"{1e3 * t:.1f} ms" for n, t in list(curve.items())[:4]} for name, curve in points.items()}
    logger.info("specdecpp: measured in %.1f s: %s, ...", time.perf_counter() - start, shown)
    return points


def measure_target(
    passes: Passes, scheduler_config: Any, max_length: int, agree: Callable[[torch.Tensor], torch.Tensor]
) -> Points:  # fmt: skip
    """As :func:`measure`, where there is no draft model: a pass of it counts as one of the target, and none is run."""
    most = scheduler_config.max_num_batched_tokens
    num_reqs = min(scheduler_config.max_num_seqs, most)
    verify = time_widths(passes.target, coarse_to_fine(min(num_reqs * (max_length + 1), most)), agree)
    logger.info("specdecpp: measured what verifications cost: %.1f ms for one row", 1e3 * verify[1])
    return {name: dict(verify) for name in CURVES}


def _time_reading(
    passes: Passes, draft: Mapping[int, float], most: int, agree: Callable[[torch.Tensor], torch.Tensor]
) -> dict[int, float]:
    """Tokens -> seconds of a draft pass that reads so many.

    Args:
        draft: what has been timed of it; the same on every rank.
        most: tokens of the widest pass that vLLM may ask for. It is timed as well if that is cheap: a GPU takes for a
            few hundred tokens what it takes for one, so these do not tell the slope beyond.
    """
    read = dict(draft)
    if widths := [n for n in READ if n <= most and n not in draft]:
        read |= time_widths(passes.draft, widths, agree)
    widest = max(read)
    if widest < most and 2 * read[widest] * most / widest < SECONDS_PER_CURVE:
        read |= time_widths(passes.draft, [most], agree)
    return dict(sorted(read.items()))


def curves(draft: Mapping[int, float], logits: Mapping[int, float], verify: Mapping[int, float]) -> Points:
    """The cost model's curves of drafting and verifying, from times of single passes.

    Args:
        draft: rows -> seconds of the draft model's forward pass.
        logits: rows -> seconds of its lm_head.
        verify: rows -> seconds of the target's forward pass and lm_head.
    """
    step = {n: draft[n] + logits[n] for n in draft if n in logits}
    widths = sorted(draft)
    # A round's first pass reads about two tokens of each request.
    first = {
        n: float(np.interp(2 * n, widths, [draft[w] for w in widths])) + logits[n]
        for n in step
        if 2 * n <= widths[-1]
    }
    return {"first": first, "step": step, "verify": dict(verify)}
