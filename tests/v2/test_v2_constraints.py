# SPDX-License-Identifier: Apache-2.0
"""As V1's, on Model Runner V2."""

from __future__ import annotations

from tests.engine import test_constraints as v1

llm = v1.llm
test_constraints_teach_nobody_else = v1.test_constraints_teach_nobody_else
