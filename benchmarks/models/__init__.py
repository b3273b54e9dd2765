# SPDX-License-Identifier: Apache-2.0
"""The small real models of the demo and the benchmarks, and where they come from."""
