# SPDX-License-Identifier: Apache-2.0
"""What passes cost on the machines that the simulator plays, and what a rule is told of it at start-up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.simulate.streams import DEPTH
from vllm_specdecpp.costs.model import CostModel, suggested_widths

READING = 0.0385
"""A token that a draft pass reads beyond its usual ones, as a share of a pass over one request, on the CPUs: one over
144 tokens takes 6.5 times as long as one over a single token."""


@dataclass(frozen=True)
class Setting:
    """True costs in seconds."""

    first: Callable[[int], float]
    """Of a round's first draft pass, by requests."""
    step: Callable[[int], float]
    """Of each further draft pass, by requests."""
    verify: Callable[[int], float]
    """Of the rest of the round, by tokens that the target reads."""
    batch: int
    per_read: float | None = None
    """Of a draft pass for each token that it reads; None: :data:`READING` of a first pass over one request."""
    busy: float = 1.0
    """Other work on the machine, in every other :data:`SPELL`: what a rule then sees of the costs is so many times as
    much."""

    def read(self, tokens: int) -> float:
        """A draft pass that reads so many tokens."""
        slope = READING * self.first(1) if self.per_read is None else self.per_read
        return self.first(1) + slope * max(tokens - 1, 0)

    def reading(self, width: int, tokens: int) -> float:
        """What the first pass of ``width`` requests takes longer for reading ``tokens`` more than usual."""
        return self.read(width + tokens) - self.read(width)

    def prefill(self, tokens: int) -> float:
        """What the target's pass takes longer for a prompt: as the draft's, as much slower as the target is."""
        return (self.read(tokens + 1) - self.read(1)) * self.verify(1) / self.first(1)

    def draft(self, widths: list[int], read: int = 0) -> float:
        """A draft phase."""
        if not widths:
            return 0.0
        seconds = self.first(widths[0]) + sum(self.step(w) for w in widths[1:])
        return seconds + self.reading(widths[0], read) if read else seconds

    def round(self, widths: list[int], tokens: int, read: int = 0) -> float:
        """A whole round that verifies ``tokens``, the last emitted token of each request among them."""
        return self.draft(widths, read) + self.verify(tokens)


SPELL = 20.0
"""Seconds."""
READ_WIDTHS = (2, 16, 64, 256)
"""Tokens of the draft passes that start-up times for what reading takes."""

SLOW, OFTEN_SLOW = 1.5, 0.2
"""How much longer a pass takes in a slow moment of the machine, and how often that is all that start-up sees. An engine
takes the least of several runs of a width, so it is that often on a machine that is busy all through its start."""

CPU_ROWS = [1, 2, 3, 4, 5, 6, 9, 17]
CPU_SECONDS = [0.156, 0.165, 0.132, 0.130, 0.127, 0.129, 0.170, 0.219]
ONE_CORE_ROWS = [1, 6, 7, 16, 21]
ONE_CORE_SECONDS = [0.185, 0.188, 0.225, 0.337, 0.399]
INT8_ROWS = [1, 2, 3, 4, 6, 8, 11]
INT8_SECONDS = [0.091, 0.127, 0.147, 0.172, 0.209, 0.235, 0.289]


def _between(rows: list[int], seconds: list[float], slope: float) -> Callable[[int], float]:
    known = [float(s) for s in np.interp(np.arange(rows[-1] + 1), rows, seconds)]
    return lambda n: known[n] if n < len(known) else known[-1] + (n - rows[-1]) * slope


_CPU, _ONE_CORE = _between(CPU_ROWS, CPU_SECONDS, 0.006), _between(ONE_CORE_ROWS, ONE_CORE_SECONDS, 0.0125)
_INT8 = _between(INT8_ROWS, INT8_SECONDS, 0.018)

SETTINGS = {
    "cpu": Setting(lambda b: 0.040, lambda b: 0.036, _CPU, 1),
    "cpu_int8": Setting(lambda b: 0.044, lambda b: 0.040, _INT8, 1),
    "one_core": Setting(lambda b: 0.055, lambda b: 0.055, _ONE_CORE, 1),
    "one_core_b4": Setting(lambda b: 0.051 + 0.004 * b, lambda b: 0.051 + 0.004 * b, _ONE_CORE, 4),
    "cpu_b4": Setting(lambda b: 0.036 + 0.006 * b, lambda b: 0.033 + 0.004 * b, _CPU, 4),
    "cpu_b16": Setting(lambda b: 0.036 + 0.006 * b, lambda b: 0.033 + 0.004 * b, _CPU, 16),
    "paper": Setting(lambda b: 0.023, lambda b: 0.023, lambda n: 0.109, 1, per_read=40e-6),
    "cheap": Setting(lambda b: 0.0033, lambda b: 0.0033, lambda n: 0.109, 1, per_read=20e-6),
    "dear": Setting(lambda b: 0.08, lambda b: 0.08, lambda n: 0.109, 1, per_read=100e-6),
    "b64": Setting(lambda b: 0.005, lambda b: 0.004, lambda n: 0.02 + 0.0006 * n, 64, per_read=20e-6),
    "b64_cheap": Setting(lambda b: 0.002, lambda b: 0.0015, lambda n: 0.008 + 0.0004 * n, 64, per_read=10e-6),
}
SETTINGS |= {f"{name}_busy": replace(SETTINGS[name], busy=1.7) for name in ("cpu_int8", "cpu_b4")}


def cost_model(setting: Setting, seed: int, scale: float = 1.0, often_slow: float = OFTEN_SLOW) -> CostModel:
    """What start-up would measure: every width a bit off, some timed in a slow moment, all by ``scale``."""
    rng = np.random.default_rng(seed)

    def measure(f: Callable[[int], float], most: int) -> dict[int, float]:
        slow = {w: SLOW if rng.random() < often_slow else 1.0 for w in suggested_widths(most)}
        return {w: scale * s * f(w) * float(np.exp(rng.normal(0, 0.03))) for w, s in slow.items()}

    most = setting.batch * (DEPTH + 1)
    tables = measure(setting.first, setting.batch), measure(setting.step, setting.batch), measure(setting.verify, most)
    read = {w: scale * setting.read(w) * float(np.exp(rng.normal(0, 0.03))) for w in READ_WIDTHS}
    return CostModel(*tables, read, max_reqs=setting.batch, max_tokens=most)


def true_costs(setting: Setting) -> CostModel:
    """Every width as it is."""
    most = setting.batch * (DEPTH + 1)
    first, step = ({w: f(w) for w in range(1, setting.batch + 1)} for f in (setting.first, setting.step))
    verify = {w: setting.verify(w) for w in range(1, most + 1)}
    read = {w: setting.read(w) for w in READ_WIDTHS}
    return CostModel(first, step, verify, read, max_reqs=setting.batch, max_tokens=most)
