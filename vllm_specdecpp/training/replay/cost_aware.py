# SPDX-License-Identifier: Apache-2.0
"""Replays recorded rounds under the engine's default rule, ``cost_aware``: its own code, round after round.

The rule learns while it serves, so its rounds have an order: prompt after prompt, as one request at a time would be
served. It starts as an engine does that has measured its costs and seen no traffic but what it is given, and the costs
stay as they are.
"""

from __future__ import annotations

import torch

from vllm_specdecpp.costs.model import CostModel
from vllm_specdecpp.decision.cost_aware.rule import CostAwareRule, Standing
from vllm_specdecpp.head.model import AcceptanceHead
from vllm_specdecpp.training.replay.chains import Chains, concatenate
from vllm_specdecpp.training.replay.replay import Lengths, RecordedEstimator, scores


def cost_aware_lengths(
    chains: Chains, costs: CostModel, head: AcceptanceHead | None, max_length: int, served: Chains | None = None
) -> Lengths:
    """What the rule drafts at the starts that its own rounds reach; nothing at the others.

    Args:
        chains: loaded with ``head``, if there is one.
        costs: of one request.
        head: whose scores the rule reads; None: the draft's top-1 probability.
        max_length: the most candidates of a round.
        served: what the rule has answered before and learnt from, loaded likewise.
    """
    if served is not None:
        both = cost_aware_lengths(concatenate([served, chains]), costs, head, max_length)
        assert both.passes is not None
        return Lengths(*(values[served.num_starts :] for values in (both.candidates, both.cut, both.passes)))
    estimator = RecordedEstimator("confidence" if head is None else "threshold", chains, head)
    lag = estimator.lag
    own = CostModel(**costs.points(), max_reqs=1, max_tokens=max_length + 1)
    rule = CostAwareRule(own, max_length, lag=lag)
    found = scores(chains, estimator, max_length).double().numpy()  # [num_starts, max_length]
    bound = chains.available.clamp(max=max_length).tolist()
    run, ends = chains.run.tolist(), chains.prompt_starts.tolist()
    candidates, passes = (torch.zeros(chains.num_starts, dtype=torch.int64) for _ in range(2))
    for prompt, (here, end) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        start = here
        while here < end:
            # The record does not say how long the prompt was: it counts as read.
            standing = Standing(str(prompt), bound[here], room=end - here, behind=0, emitted=here - start + 1)
            round_ = rule.begin([standing])
            while round_.running[0]:
                num_drawn = len(round_.widths)
                round_.step(None if num_drawn < lag else found[here, num_drawn : num_drawn + 1])
            length, num_passes = int(round_.lengths[0]), len(round_.widths)
            seconds = costs.draft_seconds(round_.widths), costs.verify.at(length + 1)
            accepted = min(length, run[here])
            candidates[here], passes[here] = length, num_passes
            rule.finish(round_, [length], [accepted], *seconds)
            here += accepted + 1
    # A round that would have ended just there counts too: the rule does not say which.
    cut = (candidates == chains.available) & (candidates < max_length) & ~chains.limited
    return Lengths(candidates, cut, passes)
