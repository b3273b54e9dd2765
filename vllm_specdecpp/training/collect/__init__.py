# SPDX-License-Identifier: Apache-2.0
"""Collecting labels: which of the draft's tokens the target accepts."""
