# SPDX-License-Identifier: Apache-2.0
"""The cost-aware rule in an engine: one state for all rounds, fed with their outcomes and times. No vLLM import."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from vllm_specdecpp.costs.file import CostFile
from vllm_specdecpp.decision.cost_aware.catch_up import CatchUp
from vllm_specdecpp.decision.cost_aware.drafting import CostAwareRound
from vllm_specdecpp.decision.cost_aware.output_lengths import OutputLengths
from vllm_specdecpp.decision.cost_aware.reliability import ReliabilityLog
from vllm_specdecpp.decision.cost_aware.rule import CostAwareRule
from vllm_specdecpp.decision.cost_aware.tail import CostAwareTail, Report
from vllm_specdecpp.decision.round import DraftRound
from vllm_specdecpp.engine.v1.inputs import RowState

logger = logging.getLogger("vllm.specdecpp")

OVERHEAD_ROUNDS = 8
"""Rounds from which a step's time beside the passes that were timed at start-up is taken."""
BATCH_MEMORY = 128.0
"""Rounds that the usual batch size remembers."""
SAVE_EVERY = 1000
"""Rounds after which the costs are saved: a server may end without a word."""


class CostAwareDrafting:
    """Begins rounds under the cost-aware rule, and tells it what became of them.

    Args:
        rule: None on ranks that follow rank 0.
        tail: decides in the rounds.
        file: where the costs are kept; None keeps them nowhere.
        agree: rank 0's tensor on every rank.
        device: of the draft model.
        measured: the costs are those of single passes: attention, sampling and scheduling are to be added once seen.
    """

    def __init__(
        self,
        rule: CostAwareRule | None,
        tail: CostAwareTail,
        file: CostFile | None,
        agree: Callable[[torch.Tensor], torch.Tensor],
        device: torch.device,
        measured: bool = False,
    ) -> None:
        self.rule, self.tail, self.file = rule, tail, file
        self.drafting = True
        """Whether the last round with a request that could draft did draft."""
        self.reliability = ReliabilityLog()
        self._catch_up = CatchUp()
        self._output_lengths = OutputLengths()
        self._mean_reqs, self._weight = 0.0, 0.0  # requests in a batch lately
        self._overheads: list[float] | None = [] if measured else None
        self._agree, self._device = agree, device
        self._round: CostAwareRound | None = None
        self._state: DraftRound | None = None  # the same round, while it is drafted
        self._step: Mapping[str, Any] = {}  # of the last round, as RoundLog.step fills it
        self._num_rounds = 0

    def begin(
        self,
        rows: Sequence[RowState],
        outcomes: Mapping[int, tuple[int, int]],
        max_lengths: Sequence[int],
        stop_token_ids: torch.Tensor | None,
        since_last_seconds: float | None,
        first_missing: Sequence[int],
        room: Sequence[int],
    ) -> DraftRound:
        """Learn from the round that was just verified, and choose who drafts now.

        Args:
            rows: the batch.
            outcomes: row -> candidates verified and accepted, of the requests that were in the last round.
            max_lengths: upper bounds on the candidate lengths.
            stop_token_ids: as in :class:`DraftRound`.
            since_last_seconds: from the end of the last round's drafting to now.
            first_missing: first position of each request whose draft KV is not right.
            room: tokens that each request may emit after its next token.
        """
        if self.rule is not None:
            if self._round is not None:
                by_request = {rows[index].request_id: outcome for index, outcome in outcomes.items()}
                self.finish(self._round, self._step, by_request, len(rows), since_last_seconds)
            self._round = self.rule.begin([row.request_id for row in rows], max_lengths)
            self._output_lengths.update({row.request_id: row.next_position for row in rows})
            self._leave_out(self._round, rows, _reading(rows, first_missing), room)
            self._round.load(self.tail.params)
        self.tail.params.packed.copy_(self._agree(self.tail.params.packed))
        longest = torch.tensor(max_lengths, dtype=torch.int32, device=self._device)  # [num_reqs]
        self._state = DraftRound(self.tail, longest, stop_token_ids=stop_token_ids, agree=self._agree)
        if any(max_lengths):
            self.drafting = self._state.goes_on()
        return self._state

    def _leave_out(
        self,
        round_: CostAwareRound,
        rows: Sequence[RowState],
        missing: Sequence[int],
        room: Sequence[int],
        extra: Sequence[float] | None = None,
    ) -> None:
        """Leave out the requests that the draft model would have to read too much of.

        Args:
            round_: as the rule began it.
            rows: the batch.
            missing: tokens that the draft model would have to read of each beyond a usual first pass.
            room: tokens that each request may emit after its next token.
            extra: seconds that reading for each of them costs besides; None: nothing.
        """
        assert self.rule is not None
        costs, gate, num_reqs = self.rule.costs, self.rule.start, len(rows)
        # Where batches are larger as a rule, others are about to join this one, or have just left it: what reading
        # brings must be worth it there.
        self._weight = min(self._weight + 1, BATCH_MEMORY)
        self._mean_reqs += (num_reqs - self._mean_reqs) / self._weight
        usual = max(round(self._mean_reqs), num_reqs, 1)
        # The draft's rows cost what the target's do, in proportion.
        widest = max(costs.verify.widths[-1], 2)
        slope = max(costs.verify.at(widest) - costs.verify.at(1), 0.0) / (widest - 1)
        per_token = slope * costs.step.at(1) / costs.verify.at(1)
        lengths = self._output_lengths
        allowed = self._catch_up.allowed(
            round_.request_ids,
            round_.running,
            [per_token * count + more for count, more in zip(missing, extra or [0.0] * num_reqs, strict=True)],
            [lengths.remaining(row.request_id, most) for row, most in zip(rows, room, strict=True)],
            room,
            first_seconds=costs.first.at(num_reqs),
            off_seconds=costs.verify.at(num_reqs),
            share_seconds=costs.verify.at(usual) / usual,
            speedup=gate.speedup if usual == num_reqs else min(gate.speedup, gate.speedup_of(usual, costs)),
            probe=round_.probe and not self.drafting,
            pays=lambda drafts: gate.speedup_with(round_.request_ids, drafts, costs) >= 1,
        )
        round_.leave_out(~allowed)

    def drop_round(self) -> None:
        """Another rule drafts from now on: what comes back is not of the last round that was begun here."""
        self._round = None

    def adapt(self, on: bool) -> None:
        """Whether the calibration goes on learning."""
        if self.rule is not None:
            self.rule.adapt = on

    def timed(self, step: Mapping[str, Any]) -> None:
        """The round's drafting has ended; ``step`` is what :meth:`RoundLog.step` says of it."""
        self._step = step
        if self._round is not None and self._state is not None:
            num_reqs, state = len(self._round.request_ids), self._state
            report = self.tail.report(num_reqs, state.max_lengths, state.lengths).cpu()
            self._round.fill(Report.of(report, num_reqs, len(self.tail.widths)))

    def finish(
        self,
        round_: CostAwareRound,
        step: Mapping[str, Any],
        outcomes: Mapping[str, tuple[int, int]],
        num_reqs: int,
        since_last_seconds: float | None,
    ) -> None:
        """Learn from a round that was verified; on the rank that decides.

        Args:
            round_: as it was drafted.
            step: ``draft_seconds``, and ``read``: tokens of each pass that read, if more than the usual two a request.
            outcomes: request id -> candidates verified and accepted.
            num_reqs: in the step that verified it.
            since_last_seconds: from the end of the round's drafting to the start of the next one's.
        """
        assert self.rule is not None
        known = [outcomes.get(request_id) for request_id in round_.request_ids]
        # The times are this round's own only if just these requests, with all their candidates, were in the step.
        whole = len(outcomes) == num_reqs == len(known) and all(
            outcome is not None and outcome[0] == length
            for outcome, length in zip(known, round_.lengths.tolist(), strict=True)
        )
        read = step.get("read", ())
        if read:
            self.rule.costs.observe_reading_round(round_.widths, step["draft_seconds"], read)
        drafted = step["draft_seconds"] if whole and not read else None
        verified = [None if outcome is None else outcome[0] for outcome in known]
        accepted = [0 if outcome is None else outcome[1] for outcome in known]
        self.reliability.verified(round_, verified, accepted)
        timed = self._without_overhead(since_last_seconds, round_) if whole and since_last_seconds is not None else None
        self.rule.finish(round_, verified, accepted, drafted, timed)
        self._num_rounds += 1
        if self._num_rounds % SAVE_EVERY == 0:
            self.save()

    def _without_overhead(self, seconds: float, round_: CostAwareRound) -> float | None:
        """The time that the cost model may learn from; None while the overhead is not known.

        It is the same for narrow and wide verifications, but the model would learn it as a factor on all of them, and
        with it too steep a slope where no real round has been yet.
        """
        if self._overheads is None:
            return seconds
        assert self.rule is not None
        costs = self.rule.costs
        self._overheads.append(seconds - costs.verify.at(len(round_.request_ids) + int(round_.lengths.sum())))
        if len(self._overheads) == OVERHEAD_ROUNDS:
            costs.verify = costs.verify.raised(max(statistics.median(self._overheads), 0.0))
            self._overheads = None
            self.save()
        return None

    def save(self) -> None:
        """Keep the costs for the next start; those of single passes alone are measured anew."""
        if self.rule is not None and self.file is not None and self._overheads is None:
            self.file.save(self.rule.costs.points())

    def stats(self) -> dict[str, Any]:
        """``rho`` by batch size (tokens/s), the calibration in force and how its estimates came true since the start
        (:class:`ReliabilityLog`), the guard's candidate length (None: the rule decides), and ``costs``: curve -> width
        -> seconds."""
        if self.rule is None:
            return {}
        acceptance, guard = self.rule.acceptance, self.rule.guard
        return {
            "rho": {str(n): self.rule.tokens_per_second(n) for n in (1, 2, 4, 8, 16, 32, 64)},
            "calibration": {
                "slope": acceptance.this.slope,
                "intercepts": acceptance.this.intercepts.tolist(),
                "reliability": self.reliability.sums(),
            },
            "guard_length": None if guard is None else guard.length,
            "costs": {
                name: {str(width): seconds for width, seconds in curve.items()}
                for name, curve in self.rule.costs.points().items()
            },
        }


def _reading(rows: Sequence[RowState], first_missing: Sequence[int]) -> list[int]:
    """Tokens of each request that the draft model has to read, beyond the two of a usual first pass."""
    return [max(row.next_position - 1 - start, 0) for start, row in zip(first_missing, rows, strict=True)]
