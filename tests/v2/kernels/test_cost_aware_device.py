# SPDX-License-Identifier: Apache-2.0
"""The cost-aware tail's device functions against the host's arrays."""

from __future__ import annotations

import pytest

from tests.v2.kernels import device_cases
from vllm_specdecpp.kernels import cost_aware_device


@pytest.mark.parametrize("check", device_cases.CHECKS, ids=lambda check: check.__name__)
def test_equals_the_host(check) -> None:
    check(cost_aware_device)
