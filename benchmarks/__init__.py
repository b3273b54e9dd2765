# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: speculation off, vLLM's own ``draft_model`` and specdecpp, interleaved in one run (see README.md)."""
