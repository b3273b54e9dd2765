# SPDX-License-Identifier: Apache-2.0
"""What rounds cost on Model Runner V2, where the first draft pass is run whether anybody drafts or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from vllm_specdecpp.decision.cost_aware.costs import CostModel
from vllm_specdecpp.decision.cost_aware.curves import Array, Curve


class _Nothing:
    """The price of a first pass that is run anyway."""

    def at(self, width: int) -> float:
        return 0.0

    def many(self, widths: NDArray[np.int64]) -> Array:
        return np.zeros(widths.shape)


class _Raised:
    """A curve, with ``extra`` seconds on top of it at every width.

    Unlike ``Curve.raised`` a view: what it is told, the curve below learns.
    """

    def __init__(self, curve: Curve, extra: float) -> None:
        self.curve, self.extra = curve, extra

    @property
    def widths(self) -> list[int]:
        return self.curve.widths

    @property
    def max_width(self) -> int:
        return self.curve.max_width

    def table(self) -> Array:
        return self.curve.table() + self.extra

    def at(self, width: int) -> float:
        return self.curve.at(width) + self.extra

    def many(self, widths: NDArray[np.int64]) -> Array:
        return self.curve.many(widths) + self.extra

    def freshness(self, width: int) -> float:
        return self.curve.freshness(width)

    def raised(self, seconds: float) -> _Raised:
        return _Raised(self.curve.raised(seconds), self.extra)


class FirstPassAlways(CostModel):
    """A cost model for rounds that all have a first pass of the whole batch: it keeps the draft model's KV right.

    So it is no price of drafting: the time of a batch's first pass counts as part of the rest of its round, and what
    the rule compares are the further passes and the rows. :meth:`of_batch` must say which batch is meant before
    anything is asked or told. The curves that are measured, learnt, shown and kept are those of :class:`CostModel`.

    Args:
        first, step, verify, max_reqs, max_tokens: as in :class:`CostModel`.

    Raises:
        ValueError: as in :class:`CostModel`.
    """

    def __init__(
        self,
        first: Mapping[int, float],
        step: Mapping[int, float],
        verify: Mapping[int, float],
        *,
        max_reqs: int = 64,
        max_tokens: int = 1024,
    ) -> None:
        super().__init__(first, step, verify, max_reqs=max_reqs, max_tokens=max_tokens)
        self._passes = CostModel(first, step, verify, max_reqs=max_reqs, max_tokens=max_tokens)
        self._num_reqs = 1
        self.first = _Nothing()  # type: ignore[assignment]
        self.step = self._passes.step
        self.verify = _Raised(self._passes.verify, 0.0)  # type: ignore[assignment]
        self.of_batch(1)

    def of_batch(self, num_reqs: int) -> float:
        """Speak of batches of ``num_reqs`` requests from now on; returns the seconds of their first pass."""
        self._num_reqs = num_reqs
        first = self._passes.first.at(num_reqs)
        self.verify.extra = first  # type: ignore[attr-defined]
        return first

    def observe(self, widths: Sequence[int], draft_seconds: float, num_tokens: int, verify_seconds: float) -> None:
        """As in :class:`CostModel`, but ``verify_seconds`` with the first pass's in it, as :attr:`verify` has them."""
        passes, raised = self._measured(), self.verify
        rest = verify_seconds - raised.extra  # type: ignore[attr-defined]
        passes.observe([self._num_reqs, *widths[1:]], draft_seconds, num_tokens, rest)
        self.of_batch(self._num_reqs)

    def points(self) -> dict[str, dict[int, float]]:
        return self._measured().points()

    def tables(self, max_reqs: int, max_tokens: int) -> tuple[Array, Array]:
        """[max_reqs + 1] seconds of a further pass, [max_tokens + 1] of a verification but for a constant."""
        passes = self._measured()
        return passes.step.many(np.arange(max_reqs + 1)), passes.verify.many(np.arange(max_tokens + 1))

    def _measured(self) -> CostModel:
        self._passes.verify = self.verify.curve  # type: ignore[attr-defined]
        return self._passes
