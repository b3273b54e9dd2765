# SPDX-License-Identifier: Apache-2.0
"""Recorded rounds on disk: the engine writes them, training reads them."""
