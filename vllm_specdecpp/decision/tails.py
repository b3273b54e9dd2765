# SPDX-License-Identifier: Apache-2.0
"""What follows the draw in every draft step: who has submitted, and who draws another candidate.

The only Python body of both steps, for one request or many, on any device. ``vllm_specdecpp.kernels`` has the same
functions as one launch each, and is tested against these. All are in place and wait for no device. What they decide is
a function of scores, state and parameters, all known before the draw: the token is only recorded, and compared with the
stop tokens (lossless: ``decision.round``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_specdecpp.decision.tail_params import HORIZON, CostAwareParams

MAX_LOG_ODDS = 8.0
"""Scores beyond are taken as this sure: float32 tells them apart no better."""
_LEAST = torch.tensor(-MAX_LOG_ODDS).sigmoid().item()


def threshold_tail(
    scores: Tensor,
    token_ids: Tensor,
    step: int,
    *,
    survival: Tensor,
    lengths: Tensor,
    running: Tensor,
    max_lengths: Tensor,
    min_length: int,
    threshold: Tensor,
    stop_token_ids: Tensor,
    draft_tokens: Tensor,
    any_running: Tensor,
    scored: bool,
) -> None:
    """S_k = S_{k-1} * score; the draft ends with candidate k if 1 - S_k > h (SpecDec++, arXiv:2405.19715).

    Drawn means submitted, whatever the token.

    Args:
        scores: [num_reqs] float32, estimated acceptance; NaN counts as 0, and all is clamped to [0, 1].
        token_ids: [num_reqs] int64 drawn at this step; ignored where not running.
        step: k, 1-based.
        survival: [num_reqs] float32, 1 before the first step.
        lengths: [num_reqs] int32, candidates submitted; 0 before the first step.
        running: [num_reqs] int32, 1 for requests that draw candidate k; afterwards for those that draw k + 1.
        max_lengths: [num_reqs] int32.
        min_length: the rule stops no request below this many candidates.
        threshold: [1] float32, h; 1 or more never stops. A tensor: a captured graph reads what it holds at replay.
        stop_token_ids: [num_reqs, num_stop] int64, padded with -1; num_stop may be 0.
        draft_tokens: [num_reqs, K] int64; column k - 1 gets the token, -1 where none was drawn.
        any_running: [1] int32 or bool, whether somebody draws candidate k + 1.
        scored: False at the first step of a lagged estimator: ``scores`` is not read.
    """
    ran = running.bool()  # [num_reqs]
    if scored:
        take_scores(survival, scores, ran)
    lengths += ran
    go_on = ran & (lengths < max_lengths)
    if step >= min_length:
        go_on &= ~(1 - survival > threshold)
    _take_in(token_ids, step, ran, go_on, stop_token_ids, draft_tokens, running, any_running)


def take_scores(survival: Tensor, scores: Tensor, ran: Tensor) -> None:
    """S_k = S_{k-1} * score for the requests that ``ran`` [num_reqs] bool; a broken score, a NaN, counts as 0."""
    score = scores.nan_to_num(nan=0.0).clamp_(0, 1)
    survival.copy_(torch.where(ran, survival * score, survival))


def cost_aware_tail(
    scores: Tensor,
    token_ids: Tensor,
    step: int,
    *,
    survival: Tensor,
    expected: Tensor,
    lengths: Tensor,
    running: Tensor,
    params: CostAwareParams,
    stop_token_ids: Tensor,
    draft_tokens: Tensor,
    any_running: Tensor,
    scores_log: Tensor,
    widths: Tensor,
    lag: int = 0,
) -> None:
    """The n best requests draw m more candidates if those bring at least as many tokens as their time is worth:

        sum of S_k a_{k+1} + ... + S_k a_{k+1}...a_{k+m}  >=  price (m step[n] + verify[T + n m] - verify[T])

    for the best n and m <= HORIZON, m at most what some request has room for; of equals the most requests. A request
    that stops submits its last look if that pays for its row. m beyond 1 since a wider verification may cost less, and
    one more draft step after it more. The next step decides anew, with what it then knows.

    At price 0 every request drafts to its limit, and submits all.

    Args:
        scores: [num_reqs] float32, acceptance of candidate k (``lag`` 0) or k - 1 (``lag`` 1); NaN: no score.
        token_ids, step, survival, lengths, stop_token_ids, any_running: as in :func:`threshold_tail`.
        expected: [num_reqs] float32, estimated number of accepted candidates; 0 before the first step.
        running: [num_reqs] int32, 1 for requests that look at candidate k; afterwards for those that draw k + 1.
        params: the round's.
        draft_tokens: [num_reqs, K] int64; column k - 1 gets the token, -1 where none is submitted.
        scores_log: [K, num_reqs] float32; row k - 1 gets the log-odds seen, NaN where none.
        widths: [K] int32; entry k - 1 gets the number of requests that looked.
        lag: which candidate a score is of.
    """
    num_reqs, position, ran = len(scores), step - lag, running.bool()
    rests, num_running = ~ran, ran.sum()
    widths[step - 1] = num_running
    log_odds = scores_log[step - 1]
    if position > 0:
        torch.logit(scores, _LEAST, out=log_odds).masked_fill_(rests, torch.nan)
        own = torch.addcmul(params.this[position], params.slopes[0], log_odds).sigmoid_()
        survival *= _known(own, params.means[position]).masked_fill_(rests, 1.0)
    else:
        log_odds.fill_(torch.nan)
    reach, ahead = survival, following(log_odds, position, HORIZON + lag, params)
    if lag:
        reach, ahead = reach * ahead[:, 0], ahead[:, 1:]

    # Seconds of a verification of so many tokens more than those submitted before this step.
    tokens = torch.arange(num_reqs * (HORIZON + 1) + 1, device=scores.device)
    verify = seconds_at(params.verify_seconds, tokens + (params.base + lengths.sum()))
    more, counts = tokens[1 : HORIZON + 1], tokens[1 : num_reqs + 1, None]  # [HORIZON], [num_reqs, 1]

    room = params.limits[:num_reqs] - lengths  # candidate k included
    steps = (reach[:, None] * ahead.cumprod(dim=1)).masked_fill_(more >= room[:, None], 0.0)
    value = steps.cumsum(dim=1).masked_fill_(rests[:, None], -1.0)  # [num_reqs, HORIZON]
    ordered, order = _ranked(value)
    seconds = more * params.step_seconds[1 : num_reqs + 1, None] + verify.take(num_running + counts * more)
    gain = ordered.cumsum(dim=0) - params.price * (seconds - verify.take(num_running))
    impossible = (counts > num_running) | (more >= room.masked_fill(rests, 0).amax())
    gain = gain.masked_fill_(impossible, -torch.inf).flip(0).flatten()
    best = gain.argmax()  # of equals the most requests, then the fewest candidates
    chosen = _first(order.index_select(1, best[None] % HORIZON)[:, 0], num_reqs - best // HORIZON)
    chosen &= ran & (room > 1) & (gain.take(best) >= 0)

    stops, submits = ran & ~chosen, ran
    if stops.is_cuda or stops.any():
        num_chosen, counts = chosen.sum(), counts[:, 0]
        ordered, order = _ranked(reach.masked_fill(~stops, -1.0))
        gain = ordered.cumsum(dim=0) - params.price * (verify.take(num_chosen + counts) - verify.take(num_chosen))
        gain.masked_fill_(counts > stops.sum(), -torch.inf)
        # Of equals the most: nothing is dropped without need.
        num = counts.masked_fill(gain != gain.amax().clamp_min_(0), 0).amax()
        submits = chosen | _first(order, num)

    expected += reach * submits
    lengths += submits
    _take_in(token_ids, step, submits, chosen, stop_token_ids, draft_tokens, running, any_running)


def following(log_odds: Tensor, position: int, num: int, params: CostAwareParams) -> Tensor:
    """Acceptance of the candidates after the one at ``position``, each given that those before it are accepted.

    The next one's follows from the score (``AcceptanceModel.next``). Those further on follow in the same way from the
    score that would have meant as much, were it the next one's own: so a high score fades to what is usual for the
    request: its level stays.

    Args:
        log_odds: [num_reqs] float32 of the score; NaN: none, the mean acceptance stands in.
        position: 1-based; 0: nothing was scored yet.
        num: how many.

    Returns:
        [num_reqs, num] float32.
    """
    levels = params.levels[: len(log_odds)]
    expected = [log_odds + levels]
    for at in range(position, position + num - 1):
        carried = torch.addcmul(params.drift[at], params.slopes[2], expected[-1])
        expected.append(carried.clamp_(-MAX_LOG_ODDS, MAX_LOG_ODDS).add_(levels))
    end = position + num
    accept = torch.addcmul(params.next[position:end], params.slopes[1], torch.stack(expected, dim=1)).sigmoid_()
    return _known(accept, params.means[position + 1 : end + 1])


def standing(
    scores_log: Tensor, survival: Tensor, step: int, lag: int, params: CostAwareParams
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """After step k, of requests that go on: chances that all candidates so far are accepted, and then the next one.

    Args:
        scores_log, survival, lag, params: as in :func:`cost_aware_tail`.
        step: k.

    Returns:
        [num_reqs] float32 each.
    """
    ahead = following(scores_log[step - 1], step - lag, 1 + lag, params)  # [num_reqs, 1 + lag]
    return (survival * ahead[:, 0] if lag else survival), ahead[:, lag]


def reach(scores_log: Tensor, widths: Tensor, lengths: Tensor, lag: int, params: CostAwareParams) -> Tensor:
    """[num_reqs] float32, chance that all submitted candidates are accepted; the round's steps are done.

    ``survival`` counts a candidate that was looked at and dropped, too.

    Args:
        scores_log, widths, lengths, lag, params: as in :func:`cost_aware_tail`; what was not scored may be anything.
    """
    most = len(widths)
    looks = scores_log[lag:].masked_fill(widths[lag:, None] == 0, torch.nan)  # of candidate k in row k - 1
    looks = torch.nn.functional.pad(looks, (0, 0, 0, lag), value=torch.nan)
    own = torch.addcmul(params.this[1 : most + 1, None], params.slopes[0], looks).sigmoid()
    own = _known(own, params.means[1 : most + 1, None])
    submitted = torch.arange(most, device=lengths.device)[:, None] < lengths
    return own.masked_fill(~submitted, 1.0).prod(dim=0)


def _known(accept: Tensor, mean: Tensor) -> Tensor:
    """``accept``, or where it is NaN the mean."""
    return torch.where(accept == accept, accept, mean)


def seconds_at(table: Tensor, index: Tensor) -> Tensor:
    """The table's entries; beyond its end the last slope goes on."""
    beyond = (index - (len(table) - 1)).clamp_min_(0)
    return table.take(index - beyond) + beyond * (table[-1] - table[-2])


def _ranked(values: Tensor) -> tuple[Tensor, Tensor]:
    """Each column of ``values`` [num_reqs, ...] from the highest on, and whose it is; of equals the first request's."""
    if len(values) == 1:
        return values, torch.zeros_like(values, dtype=torch.int64)
    ordered, order = values.sort(dim=0, descending=True, stable=True)
    return ordered, order


def _first(order: Tensor, num: Tensor) -> Tensor:
    """[num_reqs] bool, the first ``num`` of ``order`` [num_reqs]."""
    if len(order) == 1:
        return num.view(1) > 0
    places = torch.arange(len(order), device=order.device)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(0, order, places < num)


def _take_in(
    token_ids: Tensor, step: int, submits: Tensor, go_on: Tensor, stop_token_ids: Tensor, draft_tokens: Tensor,
    running: Tensor, any_running: Tensor,
) -> None:  # fmt: skip
    """Only from here on the drawn token matters: it is recorded, and may be one that ends the draft."""
    draft_tokens[:, step - 1] = token_ids.where(submits, -1)
    if stop_token_ids.shape[1]:
        go_on = go_on & (stop_token_ids != token_ids[:, None]).all(dim=1)
    running.copy_(go_on)
    any_running.copy_(go_on.any())
