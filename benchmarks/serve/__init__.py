# SPDX-License-Identifier: Apache-2.0
"""Engines that answer prompts: speculation off, vLLM's own ``draft_model`` and specdecpp's rules."""
