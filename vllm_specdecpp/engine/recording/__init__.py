# SPDX-License-Identifier: Apache-2.0
"""Recording rounds as training data: what ``vllm-specdecpp collect`` asks its engine for."""
