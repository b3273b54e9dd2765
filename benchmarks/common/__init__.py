# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: engines, methods, prompts and rows, statistics, provenance."""
