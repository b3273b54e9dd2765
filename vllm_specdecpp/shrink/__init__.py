# SPDX-License-Identifier: Apache-2.0
"""Makes a draft model cheaper: quantised weights."""
