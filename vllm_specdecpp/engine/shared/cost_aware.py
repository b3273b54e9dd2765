# SPDX-License-Identifier: Apache-2.0
"""The cost-aware rule in an engine: one state for all rounds, fed with their outcomes and times. No vLLM import."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch

from vllm_specdecpp.costs.file import CostFile
from vllm_specdecpp.decision.cost_aware.drafting import CostAwareRound
from vllm_specdecpp.decision.cost_aware.reliability import ReliabilityLog
from vllm_specdecpp.decision.cost_aware.rule import CostAwareRule, Standing
from vllm_specdecpp.decision.cost_aware.tail import CostAwareTail, Report
from vllm_specdecpp.decision.round import DraftRound
from vllm_specdecpp.decision.sources import Run, Tokens, propose
from vllm_specdecpp.decision.sources.suffix_cache import SuffixCache

logger = logging.getLogger("vllm.specdecpp")

OVERHEAD_ROUNDS = 8
"""Rounds from which a step's time beside the passes that were timed at start-up is taken."""
MOST_SEARCHING = 0.02
"""Of the time of a draft pass, or of a verification, what the search for runs behind candidates may take."""
SAVE_EVERY = 1000
"""Rounds after which the costs are saved: a server may end without a word."""


class CostAwareDrafting:
    """Begins rounds under the cost-aware rule, and tells it what became of them.

    An exception of the rule's own, which is a bug of ours, does not end the engine: from then on nobody drafts.

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
        self.reliability = ReliabilityLog()
        self._overheads: list[float] | None = [] if measured else None
        self._agree, self._device = agree, device
        self._round: CostAwareRound | None = None
        self._state: DraftRound | None = None  # the same round, while it is drafted
        self._step: Mapping[str, Any] = {}  # of the last round, as RoundLog.step fills it
        self._num_rounds = 0
        self._behind: Callable[[int, Sequence[int]], list[Run]] | None = None  # row, candidates -> runs that go on
        self._search_seconds = 0.0  # of one request, in this round
        self._is_filled = False
        self.has_failed = False

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Around what the rule does on the host: after an exception its state is nothing to go on with."""
        try:
            yield
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise  # not the rule's
        except Exception:
            self.has_failed = True
            logger.exception(
                "specdecpp: the rule has failed: nothing is drafted until the next start, and nothing is kept of what "
                "was learnt. This is a bug: please report what follows"
            )

    def _idle(self, batch: Sequence[Standing]) -> CostAwareRound:
        """A round in which nobody drafts."""
        assert self.rule is not None
        limits = np.zeros(len(batch), dtype=np.int64)
        return CostAwareRound(self.rule, [s.request_id for s in batch], limits, limits > 0, 0.0)

    def _load(self, round_: CostAwareRound) -> None:
        """Bring what the round is decided by to the tail; of a rule that has failed nothing but limits of 0."""
        if self.has_failed:
            self.tail.params.packed.zero_()
        else:
            round_.load(self.tail.params)

    def begin(
        self,
        batch: Sequence[Standing],
        outcomes: Mapping[str, tuple[int, int]],
        stop_token_ids: torch.Tensor | None,
        since_last_seconds: float | None,
        tokens: Callable[[int], Tokens] | None = None,
    ) -> DraftRound:
        """Learn from the round that was just verified, and choose who drafts now.

        Args:
            batch: the requests in it.
            outcomes: request id -> candidates verified and accepted, of the requests that were in the last round.
            stop_token_ids: as in :class:`DraftRound`.
            since_last_seconds: from the end of the last round's drafting to now.
            tokens: index in the batch -> the request's tokens so far; None: no runs in this round.
        """
        if self.rule is not None:
            round_ = None
            if not self.has_failed:
                with self._guarded():
                    if self._round is not None:
                        self.finish(self._round, self._step, outcomes, len(batch), since_last_seconds)
                    self._behind = None if tokens is None else self._finder(batch, tokens, stop_token_ids)
                    started = time.perf_counter()
                    runs = [] if self._behind is None else [self._behind(row, ()) for row in range(len(batch))]
                    self._search_seconds = (time.perf_counter() - started) / max(sum(s.limit > 0 for s in batch), 1)
                    round_ = self.rule.begin(batch, runs)
            if round_ is None:
                round_, self._behind = self._idle(batch), None
            self._round, self._is_filled = round_, False
            self._load(round_)
        self.share_params()
        longest = torch.tensor([s.limit for s in batch], dtype=torch.int32, device=self._device)  # [num_reqs]
        self._state = DraftRound(self.tail, longest, stop_token_ids=stop_token_ids, agree=self._agree)
        return self._state

    def share_params(self) -> None:
        """Rank 0's parameters of the round on every rank."""
        packed = self.tail.params.packed
        if (agreed := self._agree(packed)) is not packed:
            packed.copy_(agreed)

    def _finder(
        self, batch: Sequence[Standing], tokens: Callable[[int], Tokens], stop_token_ids: torch.Tensor | None
    ) -> Callable[[int, Sequence[int]], list[Run]] | None:  # fmt: skip
        """What finds the runs behind a request's tokens and candidates; None without sources."""
        assert self.rule is not None
        sources, longest = self.rule.sources, self.rule.max_length
        if not sources:
            return None
        stops = [[]] * len(batch) if stop_token_ids is None else stop_token_ids.tolist()
        tokens = cache(tokens)
        for source in sources:
            if isinstance(others := getattr(source, "cache", None), SuffixCache):
                texts = ((s, tokens(row)) for row, s in enumerate(batch) if s.emitted)
                others.update({s.request_id: text[max(len(text) - s.emitted, 0) :] for s, text in texts})

        def behind(row: int, candidates: Sequence[int]) -> list[Run]:
            most = min(batch[row].limit, longest) - len(candidates)
            if most < 1 or (candidates and candidates[-1] in stops[row]):
                return []
            text = tokens(row)
            return propose(sources, np.append(text, candidates) if candidates else text, most, stops[row])

        return behind

    def end_outrun(self, drawn: Sequence[Sequence[int]]) -> None:
        """End the drafts that a free run goes on from more cheaply; rank 0 decides.

        Args:
            drawn: [num_reqs] candidates so far.
        """
        state = self._state
        assert state is not None
        ends = torch.zeros_like(state.running)
        if self._round is not None and self._behind is not None and not self.has_failed:
            with self._guarded():
                running = state.running.nonzero().squeeze(1).tolist()
                num, step = len(running), self._round.rule.costs.step
                if num * self._search_seconds <= MOST_SEARCHING * step.at(num):
                    survival, accept = (x.tolist() for x in self.tail.standing(state.survival, state.num_drawn))
                    for row in running:
                        runs = self._behind(row, drawn[row])
                        ends[row] = self._round.outrun(row, runs, survival[row], accept[row], num)
        state.running.masked_fill_(self._agree(ends) > 0, 0)

    def follow(self, drafted: Sequence[Sequence[int]]) -> list[list[int]]:
        """As :meth:`free_runs` once the drafts are there: behind these, too.

        Args:
            drafted: [num_reqs] candidates of the draft model.
        """
        if self._round is not None and self._behind is not None and not self.has_failed:
            self._fill()
            round_, drafts = self._round, self._round.drafts.tolist()
            with self._guarded():
                rows = len(drafts) + int(round_.submitted.sum())
                if sum(drafts) * self._search_seconds <= MOST_SEARCHING * round_.rule.costs.verify.at(rows):
                    assert self._state is not None
                    runs = [self._behind(row, mine) if drafts[row] else [] for row, mine in enumerate(drafted)]
                    round_.follow(runs, self.tail.reach(self._state.lengths[: len(drafts)]).double().cpu().numpy())
        return self.free_runs(len(drafted))

    def free_runs(self, num_reqs: int) -> list[list[int]]:
        """[num_reqs] the candidates of requests that take a run in this round; rank 0's on every rank."""
        taken = torch.full((num_reqs, self.tail.widths.numel()), -1)
        if self._round is not None:
            for i, length in enumerate(self._round.free.lengths.tolist()):
                if length:
                    taken[i, :length] = torch.tensor(self._round.free.token_ids(i))
        return [[token for token in row if token >= 0] for row in self._agree(taken).tolist()]

    def source_of(self, row: int) -> str:
        """Whose run a request of the round has taken; on ranks that follow rank 0 nobody knows."""
        run = None if self._round is None else self._round.free.runs[row]
        return "unknown" if run is None else run.source

    def drop_round(self) -> None:
        """Forget the last round: another rule drafts from now on."""
        self._round = self._behind = None

    def timed(self, step: Mapping[str, Any]) -> None:
        """The round's drafting has ended; ``step`` is what :meth:`RoundLog.step` says of it."""
        self._step = step
        self._fill()

    def _fill(self) -> None:
        """Give the round what its steps have left, once."""
        if self._round is not None and self._state is not None and not self._is_filled:
            num_reqs, self._is_filled = len(self._round.request_ids), True
            report = self.tail.report(self._state.lengths[:num_reqs]).cpu().numpy()
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
            for outcome, length in zip(known, round_.submitted.tolist(), strict=True)
        )
        read = step.get("read", ())
        drafted = step["draft_seconds"] if read or round_.widths else None
        verified = [None if outcome is None else outcome[0] for outcome in known]
        accepted = [0 if outcome is None else outcome[1] for outcome in known]
        self.reliability.verified(round_, verified, accepted)
        timed = self._without_overhead(since_last_seconds, round_) if whole and since_last_seconds is not None else None
        self.rule.finish(round_, verified, accepted, drafted, timed, read)
        self._num_rounds += 1
        if self._num_rounds % SAVE_EVERY == 0:
            self.save()

    def _without_overhead(self, seconds: float, round_: CostAwareRound) -> float | None:
        """The time that the cost model may learn from; None while the overhead is not known.

        Sampling and scheduling were not timed at start-up, and take the same time at every width. The model learns
        factors: with the overhead of narrow verifications it would also scale up the price of a row in wide ones.
        """
        if self._overheads is None:
            return seconds
        assert self.rule is not None
        costs = self.rule.costs
        self._overheads.append(seconds - costs.verify.at(len(round_.request_ids) + int(round_.submitted.sum())))
        if len(self._overheads) == OVERHEAD_ROUNDS:
            costs.verify = costs.verify.raised(max(statistics.median(self._overheads), 0.0))
            self._overheads = None
            self.save()
        return None

    def save(self) -> None:
        """Keep the costs for the next start; those of single passes alone are measured anew."""
        if self.rule is not None and self.file is not None and self._overheads is None and not self.has_failed:
            self.file.save(self.rule.costs.points(lasting=True), self.rule.state())

    def counts(self) -> dict[tuple[str, str], float]:
        """Since the start: candidates observed, estimated and found to be accepted; seconds in trials."""
        if self.rule is None:
            return {}
        names = "observed_candidates", "estimated_accepted", "observed_accepted"
        sums = zip(names, self.reliability.sums().values(), strict=True)
        return {(name, ""): sum(bins) for name, bins in sums} | {("exploring_seconds", ""): self.rule.explored_seconds}

    def gauges(self) -> list[tuple[str, list[str], float]]:
        """(name, labels, value) of what is in force."""
        if self.rule is None:
            return []
        admission = self.rule.admission
        found: list[tuple[str, list[str], float]] = [
            ("rho", [], admission.price), ("expected_speedup", [], admission.speedup)
        ]  # fmt: skip
        for curve, points in self.rule.costs.points().items():
            found += [("cost_seconds", [curve, str(width)], seconds) for width, seconds in points.items()]
        return found

    def stats(self) -> dict[str, Any]:
        """What the rule has learnt; empty on ranks that follow rank 0.

        Returns:
            ``calibration``: slope and intercepts in force, and how the estimates came true (:class:`ReliabilityLog`).
            ``admission``: ``rho``, the tokens that a second of drafting must bring; ``speedup`` over no drafting, as
            last expected; mean ``acceptance`` and the number of ``looks`` that it rests on; ``correction``, how much
            faster drafting was than expected; ``purse_seconds``, the balance of the purse.
            ``costs``: curve -> width -> seconds. ``has_failed``: an exception has ended drafting.
        """
        if self.rule is None:
            return {}
        acceptance, admission = self.rule.acceptance, self.rule.admission
        return {
            "has_failed": self.has_failed,
            "calibration": {
                "slope": acceptance.this.slope,
                "intercepts": acceptance.this.intercepts.tolist(),
                "reliability": self.reliability.sums(),
            },
            "admission": {
                "rho": admission.price,
                "speedup": admission.speedup,
                "acceptance": admission.records.mean,
                "looks": admission.records.known,
                "correction": admission.correction,
                "purse_seconds": self.rule.purse.balance,
            },
            "sources": {
                name: {"candidates": candidates, "accepted": self.rule.free_runs.accepted[name]}
                for name, candidates in self.rule.free_runs.candidates.items()
            },
            "costs": {
                name: {str(width): seconds for width, seconds in curve.items()}
                for name, curve in self.rule.costs.points().items()
            },
        }
