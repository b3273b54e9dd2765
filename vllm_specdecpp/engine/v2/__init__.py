# SPDX-License-Identifier: Apache-2.0
"""Drafting on vLLM's Model Runner V2."""
