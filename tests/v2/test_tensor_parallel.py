# SPDX-License-Identifier: Apache-2.0
"""As V1's, on Model Runner V2."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.test_tensor_parallel import (
    by_request,
    test_ranks_that_do_not_agree_come_apart,
    test_ranks_with_different_numbers_decide_alike,
)
from tests.v2 import two_ranks

__all__ = [
    "by_request",
    "test_ranks_that_do_not_agree_come_apart",
    "test_ranks_with_different_numbers_decide_alike",
]


@pytest.fixture(scope="module")
def played() -> Any:
    """The module that the ranks run."""
    return two_ranks
