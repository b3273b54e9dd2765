# SPDX-License-Identifier: Apache-2.0
"""Heads that are trained and judged, one factor at a time."""
