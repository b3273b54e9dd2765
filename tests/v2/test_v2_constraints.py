# SPDX-License-Identifier: Apache-2.0
"""As V1's, on Model Runner V2."""

from __future__ import annotations

import pytest

from tests.engine import test_constraints as v1

llm = v1.llm
test_constraints_teach_nobody_else = v1.test_constraints_teach_nobody_else


@pytest.fixture(autouse=True)
def shorter(monkeypatch):
    """Interpreted kernels take their time."""
    monkeypatch.setattr(v1, "NUM_PROMPTS", 2)
    monkeypatch.setattr(v1, "MAX_TOKENS", 14)
