# SPDX-License-Identifier: Apache-2.0
"""Draft models with two kinds of layers on Model Runner V2, which needs nothing of ours for them."""

from __future__ import annotations

from tests.engine.test_draft_layers import gemma, test_a_draft_with_two_kinds_of_layers

__all__ = ["gemma", "test_a_draft_with_two_kinds_of_layers"]
