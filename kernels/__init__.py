# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, importable as ``vllm_specdecpp.kernels``: ``decision.tails`` in one launch each, and others beside
their torch twins."""
