# SPDX-License-Identifier: Apache-2.0
"""What the drafters of both runners share: head, rule in force, its costs, changes to it, and how ranks agree."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.logger import init_logger

from vllm_specdecpp.config import SpecDecPPConfig
from vllm_specdecpp.costs.file import CostFile
from vllm_specdecpp.costs.model import CostModel, Points
from vllm_specdecpp.costs.timing import most_tokens
from vllm_specdecpp.costs.widths import MAX_ROWS, PASSES, Rows
from vllm_specdecpp.decision import tails
from vllm_specdecpp.decision.cost_aware import CostAwareRule
from vllm_specdecpp.decision.cost_aware.tail import CostAwareTail
from vllm_specdecpp.decision.estimator import Estimator
from vllm_specdecpp.decision.from_options import make_rule
from vllm_specdecpp.decision.rules import StopRule, make_estimator
from vllm_specdecpp.engine.shared import cost_file, vocabulary
from vllm_specdecpp.engine.shared.cost_aware import CostAwareDrafting
from vllm_specdecpp.engine.shared.round_log import Counts
from vllm_specdecpp.head.model import AcceptanceHead
from vllm_specdecpp.source_registry import make_sources

logger = init_logger("vllm.specdecpp")


class Drafter:
    """Goes before vLLM's drafter in the bases (``DraftModelProposer``, ``StandaloneARSpeculator``).

    Args:
        vllm_config: its ``speculative_config`` is a plain ``draft_model`` one.
        device: where the draft model runs.
        config: our checked options.
        more: further arguments of vLLM's drafter.

    Attributes:
        config: the options in force.
        head: the acceptance head, if one is given.
        cost_aware: that rule's host side, once it was in force.
        rows: at what widths passes run, beside their own.
        log: a ``RoundLog``, or what feeds one.
    """

    host_side: ClassVar[type[CostAwareDrafting]] = CostAwareDrafting
    launch: Callable[..., None] = staticmethod(tails.cost_aware_tail)
    """The cost-aware rule's step."""

    run_sources: Sequence[str] = ()
    """Sources of free runs, by name."""

    vllm_config: VllmConfig
    speculative_config: Any
    device: torch.device
    hidden_size: int
    model: Any
    log: Any

    def __init__(self, vllm_config: VllmConfig, device: torch.device, config: SpecDecPPConfig, *more: Any) -> None:
        self.config = config
        self.head: AcceptanceHead | None = None
        self.cost_aware: Any = None
        self._tail: CostAwareTail | None = None
        self.rows: Rows = {}
        self._made = time.monotonic()
        self._taken: Counts = Counter()
        self._num_ranks = vllm_config.parallel_config.tensor_parallel_size
        super().__init__(vllm_config, device, *more)  # type: ignore[call-arg]

    def load_model(self, target_model: torch.nn.Module) -> None:
        """Load the draft model as vLLM does, then the head; every rank holds the whole head."""
        super().load_model(target_model)  # type: ignore[misc]
        vocabulary.fit_draft(self.model, self.speculative_config)
        if self.config.head is not None:
            self.head = AcceptanceHead.from_pretrained(
                self.config.head,
                revision=self.config.head_revision,
                expected_hidden_size=self.hidden_size,
                expected_draft=self.config.model,
                device=self.device,
            )
        self.set_rule(self.config)

    def set_rule(self, config: SpecDecPPConfig) -> None:
        """Put the rule of these options in force; the cost-aware one has its costs after :meth:`start_cost_aware`.

        Raises:
            ValueError: the rule cannot be made.
        """
        if config.resolved_rule != "cost_aware":
            self.put_in_force(make_rule(config, self.head), config.min_speculative_tokens)
            return
        if self._tail is None:
            scheduler, bound = self.vllm_config.scheduler_config, self.speculative_config.num_speculative_tokens
            estimator, most = make_estimator(self.head), most_tokens(scheduler)
            self._tail = CostAwareTail(estimator, scheduler.max_num_seqs, bound, most, self.device, self.launch)
        self.put_in_force(self._tail, 1)

    def put_in_force(self, rule: StopRule | CostAwareTail, min_length: int) -> None:
        """Draft by this rule from now on; a :class:`StopRule` at least ``min_length`` candidates."""
        raise NotImplementedError

    def start_cost_aware(self) -> None:
        """Give the cost-aware rule its costs, if it is in force: as the last run left them, else measured now."""
        if self.config.resolved_rule == "cost_aware" and self.cost_aware is None:
            assert self._tail is not None
            file = self.cost_file()
            rule, measured = self._rule_with_costs(file, self._tail.estimator)
            self.cost_aware = self.host_side(rule, self._tail, file, self.agree, self.device, measured)

    def _rule_with_costs(self, file: CostFile, estimator: Estimator) -> tuple[CostAwareRule | None, bool]:
        """The cost-aware rule, None on ranks that follow rank 0; and whether its costs were measured now."""
        leads, scheduler = get_tp_group().rank_in_group == 0, self.vllm_config.scheduler_config
        kept = file.load() if leads else None
        measured = not bool(self.agree(torch.tensor([kept is not None])))
        curves = self.measure_costs() if measured else None  # ranks meet in it
        if not measured:
            own = list(range(1, MAX_ROWS + 1))
            table = [(kept.rows if kept is not None else {}).get(name, own) for name in PASSES]  # [3, MAX_ROWS]
            self.pad(dict(zip(PASSES, self.agree(torch.tensor(table)).tolist(), strict=True)))
        file.rows = self.rows
        if not leads:
            return None, measured
        logger.info("specdecpp: what passes cost is kept in %s", file.path)
        if kept is not None:
            curves = kept.curves
        assert curves is not None
        rule = CostAwareRule(
            CostModel(**curves, max_reqs=scheduler.max_num_seqs, max_tokens=most_tokens(scheduler)),
            self.speculative_config.num_speculative_tokens,
            lag=estimator.lag,
            scores=self.config.head or estimator.name,
            sources=make_sources(self.run_sources, self.config.suffix_cache),
            drafts=self.config.drafts,
        )
        if kept is not None and rule.restore(kept.learnt, kept.age_seconds):
            logger.info("specdecpp: going on with what was learnt %.1f hours ago", kept.age_seconds / 3600)
        return rule, measured

    def pad(self, rows: Rows) -> None:
        """Run a few rows at these widths from now on, where they fit; the same on every rank."""
        most = self.vllm_config.scheduler_config.max_num_batched_tokens
        fitting = {name: [w if w <= most else n for n, w in enumerate(widths, 1)] for name, widths in rows.items()}
        self.rows = {name: widths for name, widths in fitting.items() if widths != list(range(1, MAX_ROWS + 1))}

    def cost_file(self, **more: str) -> CostFile:
        """Where the costs are kept between starts; ``more`` is what they depend on besides."""
        if not self.config.drafts:
            more["draft"] = "none"
        return cost_file.cost_file(self.vllm_config, self.device, **more)

    def measure_costs(self) -> Points:
        """Time both models; every rank must call it."""
        raise NotImplementedError

    def seconds_so_far(self) -> float:
        """Since the start of the engine's own part in this process, its imports left out."""
        return time.monotonic() - self._made

    def reconfigure(self, changes: dict[str, Any]) -> SpecDecPPConfig:
        """Check ``changes`` against the options and put them in force.

        Raises:
            ValueError: an unknown option, a bad value, or a bound above the start-up value.
        """
        before, config = self.config, self.config.with_changes(changes)
        bound = self.speculative_config.num_speculative_tokens
        if config.num_speculative_tokens > bound:
            raise ValueError(
                f"specdecpp: num_speculative_tokens={config.num_speculative_tokens} exceeds the "
                f"{bound} given at start-up; restart with a larger one"
            )
        self.set_rule(config)
        self.config = config
        if self.cost_aware is not None and config.resolved_rule != before.resolved_rule:
            self.cost_aware.drop_round()
        self.start_cost_aware()
        self.log.resize(config.trace_rounds)
        return config

    def agree(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's tensor on every rank: ranks that disagree would run different numbers of draft passes and hang."""
        if self._num_ranks == 1:
            return tensor
        # Not every backend can send bools.
        message = tensor.to(self.device, torch.uint8 if tensor.dtype == torch.bool else tensor.dtype)
        return get_tp_group().broadcast(message.contiguous(), src=0).to(tensor.device, tensor.dtype)

    def counts(self) -> Counts:
        """All that was counted since the start, under the names of ``engine.metrics``."""
        counts: Counts = self.log.counts
        return counts if self.cost_aware is None else Counter({**counts, **self.cost_aware.counts()})

    def take_metrics(self) -> dict[str, Any] | None:
        """What is new since the last call, whoever made it, so that several API servers add up; None on all ranks but
        the first.

        Returns:
            ``counters``: (name, label, how much more) each; ``gauges``: (name, labels, value) each.
        """
        if get_tp_group().rank_in_group != 0:
            return None
        now, before = self.counts().copy(), self._taken
        self._taken = now
        return {
            "counters": [[*key, value - before[key]] for key, value in now.items() if value > before[key]],
            "gauges": [] if self.cost_aware is None else self.cost_aware.gauges(),
        }

    def stats(self, reset: bool = False) -> dict[str, Any]:
        """Counters since start-up or the last reset, see ``RoundLog.stats``; and ``cost_aware``, if that rule has run:
        see :meth:`CostAwareDrafting.stats`."""
        found: dict[str, Any] = self.log.stats(reset=reset)
        return found if self.cost_aware is None else found | {"cost_aware": self.cost_aware.stats()}
