# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, each beside its torch twin of the same signature; importable as ``vllm_specdecpp.kernels``."""
