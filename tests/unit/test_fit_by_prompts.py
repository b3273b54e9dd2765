# SPDX-License-Identifier: Apache-2.0
"""A calibration whose priors are chosen by prompts that were left out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vllm_specdecpp.head.files import Calibration
from vllm_specdecpp.training import statistics as metrics
from vllm_specdecpp.training.fit import calibration


def rows(num_prompts: int, seed: int, effect: Tensor, num: int = 120) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores whose log-odds are right but for ``effect`` of the position, and an offset of each prompt and position
    that says nothing about other prompts. Returns logit, accepted, position, prompt."""
    generator = torch.Generator().manual_seed(seed)
    logit = 1 + torch.randn(num_prompts, num, generator=generator, dtype=torch.float64)
    position = (torch.arange(num) % 4).expand(num_prompts, num)
    own = 1.2 * torch.randn(num_prompts, 4, generator=generator, dtype=torch.float64)
    truth = logit + effect[position] + own.gather(1, position)
    accepted = torch.bernoulli(truth.sigmoid(), generator=generator)
    prompt = torch.arange(num_prompts)[:, None].expand(num_prompts, num)
    return tuple(each.flatten() for each in (logit, accepted, position + 1, prompt))  # type: ignore[return-value]


NO_EFFECT = torch.zeros(4, dtype=torch.float64)


def test_few_prompts_teach_no_intercepts() -> None:
    """Ten prompts' own offsets are not taken for the positions': on other prompts that costs what they cost."""
    judged = rows(400, 99, NO_EFFECT)
    losses, spreads = torch.zeros(3), torch.zeros(2)
    for seed in range(12):
        logit, accepted, position, prompt = rows(10, seed, NO_EFFECT)
        loose = calibration.fit_calibration(logit, accepted, position)
        found = calibration.fit_by_prompts(logit, accepted, position, prompt)
        spreads += torch.tensor([max(each.intercepts) - min(each.intercepts) for each in (found, loose)])
        best = Calibration(slope=0.75, intercepts=[0.0])  # the prompts' own offsets flatten the slope
        for i, each in enumerate((best, found, loose)):
            losses[i] += metrics.log_loss(each.probability(judged[0], judged[2]), judged[1])
    assert spreads[0] < 0.6 * spreads[1]
    assert losses[1] - losses[0] < 0.6 * (losses[2] - losses[0])


def test_a_gain_that_a_dozen_prompts_make_by_chance_moves_nothing() -> None:
    """Scores that are right on the whole, prompts that differ: the common intercept hardly follows a dozen of them."""
    moved = torch.zeros(2)
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        logit = (1 + torch.randn(12, 120, generator=generator)).double()
        own = 0.5 * torch.randn(12, 1, generator=generator)
        accepted = torch.bernoulli((logit + own).sigmoid(), generator=generator).flatten()
        prompt, position = torch.arange(12 * 120) // 120, torch.ones(12 * 120, dtype=torch.int64)
        loose = calibration.fit_calibration(logit.flatten(), accepted, position)
        found = calibration.fit_by_prompts(logit.flatten(), accepted, position, prompt)
        moved += torch.tensor([abs(found.intercepts[0]), abs(loose.intercepts[0])])
    assert moved[0] < 0.25 * moved[1]


def test_many_prompts_do() -> None:
    effect = torch.tensor([1.0, 0.0, -0.5, -1.5], dtype=torch.float64)
    logit, accepted, position, prompt = rows(600, 0, effect)
    found = calibration.fit_by_prompts(logit, accepted, position, prompt)
    differences = [each - found.intercepts[1] for each in found.intercepts]
    assert differences == pytest.approx([1 * 0.8, 0.0, -0.5 * 0.8, -1.5 * 0.8], abs=0.25)  # prompts' own flatten them


def test_a_wrong_slope_is_put_right_and_w_rej_undone() -> None:
    logit, accepted, position, prompt = rows(80, 3, NO_EFFECT, num=400)
    shift = math.log(6)
    found = calibration.fit_by_prompts(4 * (logit - shift), accepted, position, prompt, shift=shift)
    plain = calibration.fit_by_prompts(logit, accepted, position, prompt)
    assert found.slope == pytest.approx(plain.slope / 4, abs=0.02)
    assert found.intercepts == pytest.approx([each + plain.slope * shift for each in plain.intercepts], abs=0.15)


@pytest.mark.parametrize("num_prompts", [1, 2, 4])
def test_as_few_as_one_prompt(num_prompts: int) -> None:
    logit, accepted, position, prompt = rows(num_prompts, 5, NO_EFFECT)
    found = calibration.fit_by_prompts(logit, accepted, position, 7 + prompt, shift=1.8)
    assert all(math.isfinite(each) for each in (found.slope, *found.intercepts))
    if num_prompts == 1:
        assert found == calibration.fit_calibration(logit, accepted, position, shift=1.8)
        assert found != calibration.fit_calibration(logit, accepted, position)
    assert found == calibration.fit_by_prompts(logit, accepted, position, prompt, shift=1.8)


def test_wrong_rows_are_refused_in_one_line() -> None:
    logit, accepted, position, prompt = rows(3, 5, NO_EFFECT)
    logit[4] = math.nan
    with pytest.raises(ValueError, match=r"^specdecpp: 1 of 360 scores are no finite numbers[^\n]*$"):
        calibration.fit_by_prompts(logit, accepted, position, prompt)
