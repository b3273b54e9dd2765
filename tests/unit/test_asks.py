# SPDX-License-Identifier: Apache-2.0
"""The table of what users ask for is made of the tests that show it."""

from __future__ import annotations

import pytest

from tests import asks, doc_tables


def test_the_table_in_the_docs_is_true() -> None:
    assert asks.PAGE.read_text(encoding="utf-8") == asks.page(), "run python -m tests.asks"


@pytest.mark.parametrize("number", asks.ASKS)
def test_everything_asked_for_is_shown_or_says_why_not(number: int) -> None:
    assert asks.marked().get(number) or number in asks.NOTES


def test_no_mark_has_a_number_that_nobody_asked_for() -> None:
    assert set(asks.marked()) <= set(asks.ASKS)


def test_the_metrics_and_the_dashboard_in_the_docs_are_those_of_the_code() -> None:
    """``python -m tests.doc_tables > docs/grafana.json``"""
    assert doc_tables.metrics() in asks.PAGE.read_text(encoding="utf-8")
    assert asks.PAGE.with_name("grafana.json").read_text(encoding="utf-8") == doc_tables.dashboard()
