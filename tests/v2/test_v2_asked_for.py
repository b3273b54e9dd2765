# SPDX-License-Identifier: Apache-2.0
"""As V1's, on Model Runner V2."""

from __future__ import annotations

from tests.engine import test_asked_for as v1

parser = v1.parser
test_a_grammar_begins_where_reasoning_ends_inside_a_draft = v1.test_a_grammar_begins_where_reasoning_ends_inside_a_draft
test_the_prefix_cache_hits_as_without_speculation = v1.test_the_prefix_cache_hits_as_without_speculation
