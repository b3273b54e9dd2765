# SPDX-License-Identifier: Apache-2.0
"""Output layers of different widths on Model Runner V2: V1's tests on the other runner, with fewer samples."""

from __future__ import annotations

import pytest

from tests.engine.test_vocabulary import check_law, same_tokens, test_greedy_output_is_unchanged, wider

__all__ = ["same_tokens", "test_greedy_output_is_unchanged", "wider"]


@pytest.mark.parametrize("which", ["target wider", "draft wider"])
def test_sampled_output_keeps_its_law(tiny, wider, which):
    """Of the second token alone, which is a round's first candidate: few samples are enough for that."""
    check_law(tiny, wider, which, 96, slice(1, 2))
