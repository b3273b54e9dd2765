# SPDX-License-Identifier: Apache-2.0
"""A draft model with fewer positions than the target, on Model Runner V2: the same test as V1's."""

from __future__ import annotations

from tests.engine.test_draft_limit import short, test_requests_draft_to_the_drafts_last_position

__all__ = ["short", "test_requests_draft_to_the_drafts_last_position"]
