# SPDX-License-Identifier: Apache-2.0
"""What only a machine without a GPU needs: vLLM's CPU build."""
