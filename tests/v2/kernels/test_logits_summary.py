# SPDX-License-Identifier: Apache-2.0
"""logits_summary, its twin, and decision/features.features_from_logits."""

from __future__ import annotations

import pytest
import torch

from tests.v2.kernels.logits_cases import CASES, Case, check, outputs
from vllm_specdecpp.kernels import logits_summary as module

LAUNCHES = [module.logits_summary, module.logits_summary_torch]


@pytest.mark.parametrize("launch", LAUNCHES, ids=["kernel", "twin"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_features_of_the_decision_core(case: Case, launch) -> None:
    check(launch, case)


def test_no_request_is_no_launch() -> None:
    for launch in LAUNCHES:
        launch(torch.zeros(0, 5), **outputs(0, 5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3, 40).double()}, "logits is float64, must be float32 or bfloat16 or float16"),
        ({"logits": torch.zeros(40)}, r"logits have shape \[40\], must be \[num_reqs, vocab_size\]"),
        ({"logits": torch.zeros(3, 80)[:, ::2]}, r"logits has strides \[80, 2\]"),
        ({"argmax": torch.zeros(3, dtype=torch.int32)}, "argmax is int32, must be int64"),
        ({"entropy": torch.zeros(2)}, r"entropy has shape \[2\], must be \[3\]"),
        ({"partials": torch.zeros(2, 1, 5)}, r"partials has shape \[2, 1, 5\], must be \[3, 1, 5\]"),
        ({"partials": torch.zeros(3, 2, 5)}, r"partials has shape \[3, 2, 5\], must be \[3, 1, 5\]"),
        ({"partials": torch.zeros(3, 1, 6)[:, :, :5]}, "partials are not contiguous"),
    ],
)
def test_misfits_are_refused_in_one_line(change, message) -> None:
    for launch in LAUNCHES:
        a = {"logits": torch.zeros(3, 40)} | outputs(3, 40) | change
        with pytest.raises(ValueError, match=f"^specdecpp: {launch.__name__}: {message}") as error:
            launch(**a)
        assert "\n" not in str(error.value)
