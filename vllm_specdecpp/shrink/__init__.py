# SPDX-License-Identifier: Apache-2.0
"""Makes a draft model cheaper: quantised weights, and an output layer of the tokens that the target really emits."""
