# SPDX-License-Identifier: Apache-2.0
"""Model Runner V2's tests patch Triton for the whole process, so no other run may pick them up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.conftest import V2_TESTS, pytest_ignore_collect


@pytest.mark.parametrize("arguments", [[], ["tests"], ["."], ["tests/unit", "tests/engine/test_parity.py::test_x"]])
def test_v2_is_left_out_unless_it_is_named(arguments):
    assert pytest_ignore_collect(V2_TESTS, SimpleNamespace(args=arguments)) is True


@pytest.mark.parametrize("arguments", [["tests/v2"], ["tests/v2/test_oracle.py::test_x"], [str(V2_TESTS / "kernels")]])
def test_v2_runs_when_it_is_named(arguments):
    assert pytest_ignore_collect(V2_TESTS, SimpleNamespace(args=arguments)) is None


def test_nothing_else_is_left_out():
    for folder in ("unit", "engine"):
        assert pytest_ignore_collect(V2_TESTS.parent / folder, SimpleNamespace(args=["tests"])) is None
