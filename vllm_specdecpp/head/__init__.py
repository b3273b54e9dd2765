# SPDX-License-Identifier: Apache-2.0
"""The acceptance head: the model and its files."""
