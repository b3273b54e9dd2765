# SPDX-License-Identifier: Apache-2.0
"""As V1's, on Model Runner V2."""

from __future__ import annotations

import pytest

from tests import engine_harness as harness
from tests.engine import test_asked_for as v1

parser = v1.parser
test_a_grammar_begins_where_reasoning_ends_inside_a_draft = v1.test_a_grammar_begins_where_reasoning_ends_inside_a_draft


@pytest.mark.asks(14)
def test_the_prefix_cache_hits_as_without_speculation(tiny, monkeypatch):
    """With prompts of two blocks that short answers carry into the third one, in each of the turns."""
    prompts = [harness.prompts(1, seed=n, shortest=n, longest=n)[0] for n in (70, 79, 86, 92)]
    monkeypatch.setattr(harness, "prompts", lambda *args, **kwargs: prompts)
    monkeypatch.setattr(v1, "MAX_TOKENS", 8)
    v1.test_the_prefix_cache_hits_as_without_speculation(tiny)
