# SPDX-License-Identifier: Apache-2.0
"""Collecting labels, training, calibrating and tuning an acceptance head: one module a command."""
